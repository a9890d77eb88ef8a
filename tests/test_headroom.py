"""The numerics of a run in its report: the figure of headroom and the section, for what the doctor can find."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_results import make_numerics, make_results

from truthsteer import figures
from truthsteer.figures.headroom import amount, bits, first_bad, groups, headroom
from truthsteer.figures.style import Figure, style
from truthsteer.stages import report

HOSTILE = '<script>alert("t")</script> $x^2$ \x00 \ud800 {{ 7 * 7 }}'


class Page(HTMLParser):
    """The tags of a page, and the text of its section on numerics."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        start = self.text.find("\nNumerics\n")
        end = self.text.find("How layer and coefficient were chosen", start)
        self.numerics = re.sub(r"\s+", " ", self.text[start:end]) if start >= 0 else None

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.text += " " if tag in ("th", "td", "dt", "dd", "p") else ""

    def handle_data(self, data):
        self.text += data


def drawn(numerics: dict[str, Any]) -> Figure:
    with style():
        figure = headroom({"numerics": numerics})
    assert figure is not None
    return figure


def texts(figure: Figure) -> list[str]:
    """What stands in the drawing, line by line."""
    root = ElementTree.fromstring(figure.svg)
    return [(node.text or "").strip() for node in root.iter() if node.tag.endswith(("}text", "}tspan"))]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a report with these numerics and give its page; only the figure of headroom is drawn."""
    results = make_results(n=8)

    def draw(summary: dict[str, Any]) -> list[Figure]:
        with style():
            return [figure for figure in [headroom(summary)] if figure is not None]

    def run(numerics: dict[str, Any] | None) -> Page:
        monkeypatch.setattr(report.figures, "draw", draw)
        report.run(dataclasses.replace(results, numerics=numerics), tmp_path, seed=1)
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return run


def test_a_healthy_model_has_its_headroom_in_figure_and_section(write):
    page = write(make_numerics(bits=3))
    figure = drawn(make_numerics(bits=3))
    found = texts(figure)
    assert "largest: 8,190 in the residual stream, layer 6, token 0 '<bos>'" in found
    for curve in ("residual stream (3.0 bits)", "norms after sublayers (4.0 bits)", "matrix products (9.0 bits)"):
        assert curve in found
    assert "above 65,504: too large for fp16" in found
    assert "first not finite" not in figure.svg
    assert "fp16_pure is safe here, with 3.0 bits to spare." in page.numerics
    assert "What to type" not in page.numerics
    assert re.search(r"residual stream 8,190 layer 6, token 0 '<bos>' 3\.0 bits 2\.4 bits", page.numerics)
    assert re.search(r"norms after sublayers 4,090 layer 6 4\.0 bits 4\.0 bits", page.numerics)
    assert re.search(r"matrix products 128 layer 6, the activations inside the MLP 9\.0 bits", page.numerics)
    assert re.search(r"fp16_pure safe 3\.0 bits There is room\. .* fp32 unknown unknown Not tried\.", page.numerics)


def test_the_section_says_what_was_read_and_checked(write):
    text = write(make_numerics()).numerics
    assert "8 of 320 texts (311 tokens) were read with dtype=bf16 (weights bf16, residual stream as the weights" in text
    assert "steering by +2.1 in layer 3 12,300 0.0% 0.0% 0.0%" in text
    assert "handover What a layer puts out, the next receives. 0 0 passed" in text
    assert "padding sides Left and right padding agree. – 0.01 not checked" in text
    assert "longest text 61 tokens longer than steering.max_length=48 texts: 2; pairs of equal texts once they" in text
    assert "cannot help: the first token of every text overflows." in text
    assert "off by at most 1.5%; 6% without the few largest channels" in text
    assert "may overflow from 385 tokens on in tools that make them; truthsteer sums in float32" in text
    assert "short check" not in text


def test_what_mends_another_fault_stands_apart_from_the_alternatives(write):
    numerics = make_numerics(bits=-3)
    numerics["overrides"] = ["dtype=bf16", "dtype=fp16"]
    numerics["besides"] = [{"type": "steering.max_length=61", "why": "2 pairs are equal"}]
    assert (
        "What to type: dtype=bf16 or dtype=fp16 What to type as well: steering.max_length=61 (2 pairs are equal)"
        in (write(numerics).numerics)
    )
    numerics["overrides"] = []
    assert "What to type: steering.max_length=61 (2 pairs are equal)" in write(numerics).numerics


def test_points_that_were_not_seen_are_named(write):
    numerics = make_numerics()
    numerics["missing_points"] = ["mlp_act of layers [3]"]
    assert "not seen mlp_act of layers [3]" in write(numerics).numerics


def test_an_error_that_is_not_finite_is_no_error_of_the_page(write):
    numerics = make_numerics()
    numerics["reference"] = {"layers": [None], "layers_without_massive": [None], "largest": None}
    assert "fp32 off by more than can be said: not finite (residual" in write(numerics).numerics


def test_what_the_verdict_says_is_said_once(write):
    numerics = make_numerics(nan_from=2)
    numerics["verdict"] = f"dtype=fp16_pure fails at {numerics['passes'][0]['first']['where']}."
    assert "Numbers are first" not in write(numerics).numerics


def test_a_failed_check_is_called_failed(write):
    numerics = make_numerics()
    numerics["checks"][0] |= {"passed": False, "value": True, "bound": "none"}
    assert "the next receives. yes none FAILED" in write(numerics).numerics


def test_what_fp16_cannot_hold_stands_above_the_line(write):
    numerics = make_numerics(bits=-4)
    found = texts(figure := drawn(numerics))
    assert "largest: 1,050,000 in the residual stream, layer 6, token 0 '<bos>'" in found
    assert "residual stream (−4.0 bits)" in found
    assert "largest when steered by +2.1 in layer 3 (−4.6 bits)" in found
    assert (
        "Residual stream, headroom −4.0 bits: largest 1,050,000 in layer 6; 16,400 in layer 0; 32,800 in" in figure.alt
    )
    assert "too large for fp16 in 7 of 12 layers, 3 to 9" in figure.alt
    text = write(numerics).numerics
    assert "fp16_pure overflows on this model. What to type: dtype=fp16 " in text
    assert "fp16_pure NOT SAFE −4.0 bits" in text


@pytest.mark.parametrize("room", [0.5, -0.5])
def test_a_point_stands_on_its_side_of_the_line(room):
    numerics = make_numerics(layers=2, bits=room, norms=False, thorough=False)
    numerics["layers"] = numerics["layers"][1:]
    svg = drawn(numerics).svg
    [line] = re.findall(r'<path d="M [\d.]+ ([\d.]+) \nL [\d.]+ \1 \n"[^>]*stroke: #c2255c', svg)
    point, *_ = re.findall(r'<use xlink:href="#\w+" x="[\d.]+" y="([\d.]+)" style="fill: #0b7285', svg)
    assert (float(point) > float(line)) == (room > 0), "y grows downwards"


def test_where_numbers_are_first_not_finite_is_marked(write):
    numerics = make_numerics(nan_from=2, dtype="fp16_pure")
    found = texts(figure := drawn(numerics))
    assert "first not finite:" in found
    assert "the residual add after the MLP of layer 2" in found
    assert "largest finite number: 256 in the residual stream, layer 1, token 0 '<bos>'" in found
    assert "residual stream (not finite)" in found
    assert "not finite in 10 of 12 layers, 2 to 11" in figure.alt
    assert "Numbers that are not finite are not drawn." in figure.caption
    text = write(numerics).numerics
    assert "Numbers are first not finite at the residual add after the MLP of layer 2 (token 3 '<bos>')." in text
    assert "right padding 256 100.0% 98.0% 0.0%" in text
    assert "residual stream 256 layer 1, token 0 '<bos>' not finite" in text


def test_what_is_left_of_a_layer_is_not_called_finite():
    """Another text's numbers are finite in every layer."""
    numerics = make_numerics(bits=1)
    numerics["passes"][0] |= {"bad_texts": 0.5, "bad_real": 0.4}
    assert [group.finite for group in groups(numerics)] == [False, False, False, True]
    assert "residual stream (not finite)" in texts(drawn(numerics))


@pytest.mark.parametrize(
    ("layer", "where"), [(-1, "the embedding"), (12, "the final norm"), (0, "the input of layer 0")]
)
def test_the_first_point_may_stand_outside_the_layers(layer, where):
    numerics = make_numerics(nan_from=0)
    numerics["passes"][0]["first"] |= {"layer": layer, "where": where, "token": None}
    found = texts(drawn(numerics))
    assert "no number is finite" in found
    assert where in found
    assert first_bad(numerics)["sentence"] == f"Numbers are first not finite at {where}."


def test_what_only_steering_or_padding_does_is_said_to_be_so():
    numerics = make_numerics()
    first = make_numerics(nan_from=2)["passes"][0]["first"]
    numerics["passes"][2] |= {"first": first, "bad_real": 0.2, "largest": None}
    assert "first not finite under steering at" in first_bad(numerics)["sentence"]
    found = texts(drawn(numerics))
    assert "first not finite under steering:" in found
    assert "residual stream (3.0 bits)" in found
    assert not [text for text in found if text.startswith("largest when steered")]
    numerics["passes"][1] |= {"first": first, "bad_pad": 1.0}
    assert "not finite under left padding, in padding alone at" in first_bad(numerics)["sentence"]


def test_a_model_without_post_norms_has_no_curve_for_them(write):
    numerics = make_numerics(norms=False)
    figure = drawn(numerics)
    assert not [text for text in texts(figure) if text.startswith("norms")]
    assert "Norms after" not in figure.alt
    assert "matrix products (9.0 bits)" in texts(figure)
    assert figure.svg.count("#5f3dc4") > 3, "matrix products keep their colour"
    text = write(numerics).numerics
    assert "norms after sublayers – none in this model, or not seen –" in text


def test_the_check_before_extraction_is_called_one(write):
    numerics = make_numerics(thorough=False)
    assert not [text for text in texts(drawn(numerics)) if "steered" in text]
    text = write(numerics).numerics
    assert "in the short check before extraction; stages=[doctor] checks more" in text
    assert "steering by" not in text
    assert "left padding 8" not in text
    assert "against the same model in fp32" not in text


def test_a_report_without_numerics_has_neither(write, tmp_path):
    page = write(None)
    assert page.numerics is None
    assert "svg" not in page.tags
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["numerics"] is None


def test_the_summary_has_the_whole_report(write, tmp_path):
    numerics = make_numerics(nan_from=2)
    write(numerics)
    found = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["numerics"]

    def same(a: Any, b: Any) -> None:
        assert a == (pytest.approx(b, rel=1e-5) if isinstance(b, float) else b)

    for key, item in numerics.items():
        if key != "layers":
            assert json.dumps(found[key])[:20] == json.dumps(item)[:20], key
    for a, b in zip(found["layers"], numerics["layers"], strict=True):
        same(a["residual"]["largest"], b["residual"]["largest"])
        same(a["residual"]["bits_fp16"], b["residual"]["bits_fp16"])
        assert a["residual"]["channel"] == 443


def test_the_figure_comes_last_and_is_the_same_byte_for_byte(monkeypatch):
    summary = {"numerics": make_numerics()}
    for name in ("dose_response", "frontier", "heat_map", "categories"):
        module = __import__(f"truthsteer.figures.{name}", fromlist=[name])
        monkeypatch.setattr(module, name, lambda _, name=name: Figure(name, name, "", "", "<svg ></svg>"))
    first, second = figures.draw(summary), figures.draw(copy.deepcopy(summary))
    assert first[-1].name == "headroom"
    assert len(first) == 5
    assert first[-1] == second[-1]
    assert not [colour for colour in figures.PALETTE.values() if colour in figures.inline(first[-1])]


@pytest.mark.parametrize("layers", [1, 2, 62])
def test_it_draws_any_depth(layers):
    found = texts(drawn(make_numerics(layers=layers, bits=-3)))
    assert "0" in found
    numbers = [int(text) for text in found if text.isdecimal()]
    assert len(numbers) < 40


def test_a_hostile_token_stays_text(write, tmp_path):
    numerics = make_numerics(nan_from=2, token=HOSTILE)
    numerics["verdict"] = numerics["context"] = numerics["passes"][0]["first"]["where"] = HOSTILE
    numerics["policies"][0]["why"] = numerics["checks"][0]["meaning"] = HOSTILE
    numerics["overrides"], numerics["missing_points"] = [HOSTILE], [HOSTILE]
    numerics["besides"] = [{"type": HOSTILE, "why": HOSTILE}]
    page = write(numerics)
    assert "script" not in page.tags
    assert page.numerics.count("{{ 7 * 7 }}") >= 9
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "\x00" not in text
    shown = "".join(ElementTree.parse(tmp_path / "figures" / "headroom.svg").getroot().itertext())
    assert '<script>alert("t")</script>' in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not finite"),
        (0.0, "0"),
        (0.01234, "0.0123"),
        (65536.0, "65,500"),
        (999.6, "1,000"),
        (1.04e6, "1,040,000"),
        (4.2e12, "4.2e+12"),
    ],
)
def test_amounts_are_readable(value, text):
    assert amount(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "unknown"), (3.04, "3.0 bits"), (-4.0, "−4.0 bits"), (-0.04, "0.0 bits")]
)
def test_bits_have_their_sign_and_no_negative_zero(value, text):
    assert bits(value) == text
