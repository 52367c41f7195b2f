"""An offline decomposition of a plain model, for the tests of its parts."""

import copy
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from ipca.io.checkpoint import WHOLE, Checkpoint
from ipca.model import AdapterSettings
from ipca.model.targets import find_targets
from ipca.offline.adapter_files import write_adapter, write_residual
from ipca.offline.decompose import decompose_layers, install_layers
from ipca.offline.ranks import Ranks
from ipca.offline.source import CheckpointSource, ModelSource
from ipca.offline.work_folder import WorkFolder


def on_meta(model: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(model).to("meta")


class Run:
    """One run on a plain model whose checkpoint is a single file."""

    def __init__(self, tmp_path: Path, model: torch.nn.Module, settings: AdapterSettings):
        self.base, self.settings = model, settings
        self.folder, self.out = tmp_path / "model", tmp_path / "out"
        self.folder.mkdir(exist_ok=True)
        save_file(model.state_dict(), self.folder / WHOLE)

    def source(self) -> CheckpointSource:
        model, checkpoint = on_meta(self.base), Checkpoint.open(self.folder)
        targets = find_targets(model, self.settings, values=False)
        return CheckpointSource(model, checkpoint, {target.name: f"{target.name}.weight" for target in targets})

    def __call__(self, *, finish: bool = True, source=None, **options) -> WorkFolder:
        source, work = source or self.source(), WorkFolder(self.out)
        targets = find_targets(source.model, self.settings, values=isinstance(source, ModelSource))
        work.open({"settings": asdict(self.settings)})
        try:
            layers, _ = decompose_layers(source, targets, self.settings, work, Ranks(), progress=False, **options)
            install_layers(source.model, layers, work)
            if self.settings.form == "residual":
                write_residual(source, layers, work, Ranks(), str(self.out / "base"))
            else:
                write_adapter(source, layers, work, work.final, base_model=None)
            if finish:
                work.finish()
        finally:
            work.close()
        return work
