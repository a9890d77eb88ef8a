"""The launchers `hydra/launcher=slurm` and `hydra/launcher=local`. Hydra finds them here; what they do is in
truthsteer/launching.py.

Hydra executes this module before it is in sys.modules, so annotations must not be strings here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher


class SlurmLauncher(BaseSubmititLauncher):
    """Every point of a sweep is a Slurm job."""

    _EXECUTOR = "slurm"

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from truthsteer import launching

        assert self.hydra_context is not None
        assert self.config is not None
        launching.launch(self._EXECUTOR, self.hydra_context.config_loader, self.config, job_overrides, initial_job_idx)
        return []


class LocalLauncher(SlurmLauncher):
    """Every point of a sweep is a process of this machine."""

    _EXECUTOR = "local"


@dataclass
class SlurmConf(SlurmQueueConf):
    """Keys of hydra-submitit-launcher, and those of ours."""

    _target_: str = "hydra_plugins.truthsteer_launcher.SlurmLauncher"
    # stay until every job has ended; false: submit, print the jobs' ids, and return
    wait: bool = True
    # whether nodes have no network, so that weights and data must be there; null: as HF_HUB_OFFLINE says
    offline: Optional[bool] = None  # noqa: UP045 (OmegaConf reads it)


@dataclass
class LocalConf(LocalQueueConf):
    """The same for processes of this machine."""

    _target_: str = "hydra_plugins.truthsteer_launcher.LocalLauncher"
    # minutes after which a process is started again; null: never
    timeout_min: Optional[int] = None  # type: ignore[assignment]  # noqa: UP045
    # processes at once; null: as many as there are GPUs for, or 1
    at_once: Optional[int] = None  # noqa: UP045
    offline: Optional[bool] = None  # noqa: UP045


for _name, _node in (("truthsteer_slurm", SlurmConf), ("truthsteer_local", LocalConf)):
    ConfigStore.instance().store(group="hydra/launcher", name=_name, node=_node, provider="truthsteer")
