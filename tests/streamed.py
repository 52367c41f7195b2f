"""A streaming job on a plain model, for the tests of its parts."""

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file

from ipca import PCConfig
from ipca.io.checkpoint import WHOLE, Checkpoint
from ipca.model.targets import find_targets
from ipca.offline.adapter_files import write_adapter
from ipca.offline.decompose import decompose_layers, install_layers
from ipca.offline.ranks import Team
from ipca.offline.source import CheckpointSource, ModelSource
from ipca.offline.work_folder import Job


def on_meta(model: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(model).to("meta")


class Run:
    """One job on a plain model whose checkpoint is a single file."""

    def __init__(self, tmp_path: Path, model: torch.nn.Module, config: PCConfig):
        self.base, self.config = model, config
        self.folder, self.out = tmp_path / "model", tmp_path / "out"
        self.folder.mkdir(exist_ok=True)
        save_file(model.state_dict(), self.folder / WHOLE)

    def source(self) -> CheckpointSource:
        model, checkpoint = on_meta(self.base), Checkpoint.open(self.folder)
        targets = find_targets(model, self.config, values=False)
        return CheckpointSource(model, checkpoint, {target.name: f"{target.name}.weight" for target in targets})

    def __call__(self, *, finish: bool = True, source=None, **options) -> Job:
        source, job = source or self.source(), Job(self.out)
        targets = find_targets(source.model, self.config, values=isinstance(source, ModelSource))
        job.open({"config": self.config.to_json()})
        try:
            layers, _ = decompose_layers(source, targets, self.config, job, Team(), progress=False, **options)
            install_layers(source.model, layers, job)
            if self.config.form == "residual":
                source.write_residual(layers, job, Team(), str(self.out / "base"))
            else:
                write_adapter(source.model, layers, job, job.final, base_model=None)
            if finish:
                job.finish()
        finally:
            job.close()
        return job
