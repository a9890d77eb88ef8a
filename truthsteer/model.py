"""A language model, frozen, with what steering needs of it: its decoder layers, a forward pass, logits, a tokenizer.

Works on Hugging Face causal LMs whose `get_decoder()` has `.layers` and whose logits are the head's, at most soft-capped
(Gemma 2 and 3, text or multimodal, Qwen, Llama ...); others are refused when they are loaded. It knows nothing of
questions, conditions or the store.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from truthsteer import loading
from truthsteer.checkpoint import Checkpoint, resolve
from truthsteer.config import EMBEDDED, Attention, Device, DtypeConfig, ModelConfig, Quantize, Residual, Weights
from truthsteer.errors import UserError
from truthsteer.hooks import StopForwardError

log = logging.getLogger("truthsteer")

E = TypeVar("E", bound=Enum)

MASK_GAP = {True: 1e-3, False: 0.05}
"""How far apart, relative to their norm, hidden states of a text alone and in a tree may be: in fp32, and in fewer bits."""


class LanguageModel:
    """A causal language model in evaluation mode, without gradients.

    Attributes:
        model: the transformers model.
        tokenizer: its tokenizer.
        decoder: the text decoder (`get_decoder()`).
        layers: its decoder layers.
        chat: whether questions are asked through the chat template.
        any_mask: whether its attention takes a mask of who sees whom.
        policy: the numeric policy it was loaded under; None if it was given.
        cautions: what the hardware makes of the dtype, a sentence each.
    """

    policy: DtypeConfig | None = None
    cautions: tuple[str, ...] = ()

    def __init__(self, model: Any, tokenizer: Any, chat: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.chat = chat
        self.decoder = model.get_decoder()
        if not isinstance(getattr(self.decoder, "layers", None), nn.ModuleList):
            raise UserError(
                f"{type(model).__name__} has no list of decoder layers to steer. Use a Gemma, Qwen or Llama model."
            )
        self.layers: nn.ModuleList = self.decoder.layers
        self.text_config = model.config.get_text_config()
        self.num_layers = len(self.layers)
        self.hidden_size: int = self.text_config.hidden_size
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.eos_ids = _eos_ids(model, tokenizer)
        self._softcap = getattr(self.text_config, "final_logit_softcapping", None)
        self.any_mask = self._takes_any_mask()
        self._check_head()

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: str = "fp32",
        residual: str = "same",
        attention: str = "sdpa",
        quantize: str = "none",
        device: str = "auto",
        revision: str | None = None,
        chat: bool = False,
        trust_remote_code: bool = False,
    ) -> LanguageModel:
        """Load a model by name, for use in a notebook.

        Args:
            name: `"organism"` (the embedded model), a folder, or a hub id.
            dtype: `fp32`, `bf16` or `fp16`, of weights and matrix products.
            residual: `same`, or `fp32` for a float32 residual stream under 16-bit weights.
            attention: attention implementation of transformers.
            quantize: `none`, or `int8` or `int4` for linear weights in so many bits (bitsandbytes).
            device: `auto`, `cpu`, `cuda` or `mps`.
            revision: branch, tag or commit on the hub.
            chat: ask through the chat template.
            trust_remote_code: run code that comes with the checkpoint.

        Raises:
            UserError: nothing there, an option that does not exist, or weights that are missing or not finite.
        """
        path = EMBEDDED if name == "organism" else name if Path(name).expanduser().is_dir() else None
        config = ModelConfig(
            name=name,
            id=None if path else name,
            path=path,
            revision=revision,
            chat_template=chat,
            trust_remote_code=trust_remote_code,
        )
        policy = DtypeConfig(
            dtype,
            _option("dtype", Weights, dtype),
            _option("residual", Residual, residual),
            _option("attention", Attention, attention),
            quantize=_option("quantize", Quantize, quantize),
        )
        return cls.from_config(config, policy, _option("device", Device, device))

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        policy: DtypeConfig,
        device: Device = Device.auto,
        checkpoint: Checkpoint | None = None,
        depth: int | None = None,
    ) -> LanguageModel:
        """Load the checkpoint of `config` under a numeric policy; see `load` for errors. With `depth`, only its first
        layers."""
        target = pick_device(device)
        model, tokenizer, cautions = loading.load(config, policy, target, checkpoint or resolve(config), depth)
        try:
            lm = cls(model, tokenizer, config.chat_template)
        except RuntimeError as error:
            if policy.quantize is Quantize.none:
                raise
            first = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{config.name} cannot compute with dtype={policy.name} on {target}: {first}. Type dtype=bf16."
            ) from error
        lm.policy, lm.cautions = policy, tuple(cautions)
        return lm

    @torch.no_grad()
    def _check_head(self) -> None:
        """Our logits must be the model's own: some architectures scale theirs."""
        ids = torch.arange(1, 5, device=self.device)[None]
        own = self.model(input_ids=ids).logits.float()
        ours = self.logits(self.forward(ids)).to(own.device)
        both = torch.isfinite(own) & torch.isfinite(ours)  # numbers that overflow are found elsewhere, and told better
        own, ours = own[both], ours[both]
        if own.numel() and not torch.allclose(ours, own, rtol=0.02, atol=0.02 * float(own.abs().max())):
            raise UserError(
                f"{type(self.model).__name__} changes its logits after the head in a way that truthsteer does not know. "
                "Use a Gemma, Qwen or Llama model."
            )

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight.device

    def layer_device(self, layer: int) -> torch.device:
        """Where a layer computes; its weights may rest elsewhere until then."""
        self.check_layer(layer)
        for module in self.layers[layer].modules():  # accelerate's hooks, where it moves weights or inputs
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
        return next(self.layers[layer].parameters()).device

    def check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise UserError(f"layer={layer} is not a layer of this model. Type 0 to {self.num_layers - 1}.")

    def check_vector(self, vector: Tensor, layer: int) -> None:
        """Raise unless `vector` is finite and as wide as the residual stream, and the layer exists."""
        self.check_layer(layer)
        if tuple(vector.shape) != (self.hidden_size,):
            raise UserError(
                f"A vector of shape {list(vector.shape)} does not fit a residual stream of {self.hidden_size}. It was "
                "estimated on another model."
            )
        if not bool(torch.isfinite(vector).all()):
            raise UserError("The vector holds numbers that are not finite. Estimate it again, with dtype=bf16 or fp32.")

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.text_config)

    @torch.no_grad()
    def forward(
        self,
        ids: Tensor,
        cache: DynamicCache | None = None,
        mask: Tensor | None = None,
        start: int = 0,
        positions: Tensor | None = None,
    ) -> Tensor | None:
        """The final hidden states, [batch, tokens, hidden]; None if a `capture(..., stop=True)` ended the pass.

        Args:
            ids: [batch, tokens]. Right padding needs no mask: a causal model cannot see it.
            cache: keys and values of earlier tokens; this pass appends its own.
            mask: [batch, earlier + tokens], 1 for real tokens, only needed for left padding; or, if `any_mask`,
                [batch, tokens, earlier + tokens], true where a token sees another, which needs `positions`.
            start: number of earlier tokens (ignored where a mask counts them).
            positions: [batch, tokens], of each token in its text, where it is not its place.
        """
        attention: Any = mask
        if positions is not None:
            assert mask is not None
            attention = self._attention_masks(mask, positions)
        elif mask is None:
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None].expand(ids.shape[0], -1)
        else:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        try:
            output = self.decoder(
                input_ids=ids,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        except StopForwardError:
            return None
        return output.last_hidden_state

    @property
    def only_attends(self) -> bool:
        """Whether what a layer keeps of earlier tokens are their keys and values, all or those in a window."""
        return set(getattr(self.text_config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}

    @torch.no_grad()
    def _takes_any_mask(self) -> bool:
        """Tried: two texts that share their beginning, as one tree and each alone."""
        kinds, window = (
            getattr(self.text_config, "layer_types", None),
            getattr(self.text_config, "sliding_window", None),
        )
        masked, kind = {Attention.sdpa.value, Attention.eager.value}, type(self.model).__name__
        if not self.only_attends or self.text_config._attn_implementation not in masked:
            return False
        if kinds is not None and window is not None and "sliding_attention" not in kinds:
            return False  # Mistral's layers have the window all the same, others do not
        tree, parents = [1, 2, 3, 4, 5, 6], [-1, 0, 1, 2, 1, 4]
        sees = torch.eye(len(tree), dtype=torch.bool)
        for node, parent in enumerate(parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        ids, positions = torch.tensor([tree], device=self.device), sees.sum(-1)[None].to(self.device) - 1
        try:
            together = self.forward(ids, mask=sees[None].to(self.device), positions=positions)
            apart = [self.forward(ids[:, nodes]) for nodes in ([0, 1, 2, 3], [0, 1, 4, 5])]
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            log.info("%s takes no mask of its own (%s): each text is computed apart, which is slower", kind, error)
            return False
        assert together is not None
        found = torch.cat([together[:, [0, 1, 2, 3]], together[:, [0, 1, 4, 5]]]).float()
        wanted = torch.cat([states for states in apart if states is not None]).float()
        both = torch.isfinite(found) & torch.isfinite(wanted)  # numbers that overflow are found elsewhere
        gap = (found - wanted)[both].norm() / wanted[both].norm().clamp(min=1e-30)
        taken = bool(gap <= MASK_GAP[self.model.dtype == torch.float32])
        if not taken:
            log.info(
                "%s does not heed a mask (off by %.2g): each text is computed apart, which is slower", kind, float(gap)
            )
        return taken

    def _attention_masks(self, sees: Tensor, positions: Tensor) -> Any:
        """What the decoder takes as a mask of who sees whom: one for each kind of its layers.

        Args:
            sees: [batch, tokens, earlier + tokens] bool.
            positions: [batch, tokens]; the earlier tokens' are their places.
        """
        window, kinds = (
            getattr(self.text_config, "sliding_window", None),
            getattr(self.text_config, "layer_types", None),
        )
        if window is None or (kinds is not None and "sliding_attention" not in kinds):
            return self._attention_mask(sees[:, None])
        places = positions.int()
        earlier = torch.arange(sees.shape[2] - sees.shape[1], device=sees.device, dtype=torch.int32)
        columns = torch.cat([earlier[None].expand(len(sees), -1), places], 1)
        near = self._attention_mask((sees & (places[:, :, None] - columns[:, None] < window))[:, None])
        return (
            near
            if kinds is None
            else {"full_attention": self._attention_mask(sees[:, None]), "sliding_attention": near}
        )

    def _attention_mask(self, sees: Tensor) -> Tensor:
        """As the implementation wants it: eager attention adds it to its scores."""
        if self.text_config._attn_implementation == Attention.sdpa.value:
            return sees
        dtype = self.model.dtype
        return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)

    @torch.no_grad()
    def logits(self, hidden: Tensor | None, words: slice | None = None) -> Tensor:
        """Next-token logits in float32, soft-capped as the model's own head does. [..., hidden] -> [..., vocabulary].

        With `words`, those of a part of the vocabulary, where the head is sliceable.
        """
        assert hidden is not None, "a capture ended the pass early: there is nothing to read logits from"
        head = self.model.get_output_embeddings()
        if words is None or words == slice(0, self.text_config.vocab_size):
            return self.capped(head(hidden).float())
        bias = None if head.bias is None else head.bias[words]
        return self.capped(nn.functional.linear(hidden.to(head.weight.dtype), head.weight[words], bias).float())

    @property
    def sliceable_head(self) -> bool:
        """Whether the head is a plain matrix that is where it computes."""
        head = self.model.get_output_embeddings()
        return type(head) is nn.Linear and head.weight.device == self.device

    def capped(self, logits: Tensor) -> Tensor:
        """What the head gives, soft-capped if the model does that (Gemma 2)."""
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def pad(self, sequences: Sequence[Sequence[int]], left: bool = False) -> tuple[Tensor, Tensor]:
        """Ids and mask, both [batch, longest], padded on the right or on the left."""
        longest = max(len(sequence) for sequence in sequences)
        ids = torch.full((len(sequences), longest), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            span = slice(longest - len(sequence), longest) if left else slice(0, len(sequence))
            ids[row, span] = torch.tensor(sequence, dtype=torch.long)
            mask[row, span] = 1
        return ids.to(self.device), mask.to(self.device)


def select_rows(
    cache: DynamicCache, index: Tensor, below: Tensor | None = None, trunk: int | None = None
) -> DynamicCache:
    """A cache with the rows that `index` names, in that order; the given cache stays as it is.

    Up to layer `trunk`, where a cache shared by several conditions holds fewer rows, those that `below` names.
    """
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    layers: list[Any] = chosen.layers
    for number, layer in enumerate(layers):
        if layer.is_initialized:  # layers above the last one that ran hold nothing
            own = below if below is not None and trunk is not None and number <= trunk else index
            layer.batch_select_indices(own.to(layer.keys.device))
    return chosen


def pick_device(device: Device) -> torch.device:
    """The device that a config asks for.

    Raises:
        UserError: it is not there.
    """
    if device is Device.auto:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[device.value]:
        raise UserError(f"device={device.value} is not available here. Type device=cpu or device=auto.")
    return torch.device(device.value)


def _option(name: str, options: type[E], value: str) -> E:
    try:
        return options(value)
    except ValueError:
        known = ", ".join(str(option.value) for option in options)
        raise UserError(f"{name}={value!r} is not one of {known}. Type one of them.") from None


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    config = getattr(model, "generation_config", None)
    found = config.eos_token_id if config is not None else None
    ids = set(found) if isinstance(found, (list, tuple)) else set() if found is None else {found}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(int(value) for value in ids)
