"""`fastconv demo --finetune`: transfer learning, from weights that the user has or from one half of the classes to the other."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .. import patching
from .data import Images
from .run import Options, Run, build

SEQUENCES = ("stages", "layers", "blocks", "features")  # what models call the list of their stages


class FineTuning(Run):
    """A run of which only a part learns; a new head alone may go faster than what it stands on."""

    def __post_init__(self):
        self.learning_rate = 2e-3 if self.options.finetune == "linear" else 2e-4
        super().__post_init__()


def prepare(options: Options) -> tuple[Images, nn.Module]:
    """The images and the unpatched model: pretrained, with a new head, frozen as the options say. ValueError for a bad option."""
    args = options.data, options.image_size, options.batch_size, options.seed
    if options.weights:
        data = Images(*args)
        model = build(options, len(data.classes))
        load(model, options.weights)
    else:
        source, data = Images(*args, half=0), Images(*args, half=1)
        model = build(options, len(source.classes))
        freeze(model, options.finetune)  # an impossible wish fails here, not after minutes of training
        model.requires_grad_(True).train()
        patching.patch(model)
        run = Run("pretraining", model, options, "channels_last")
        for number in range(options.steps):
            run.step(number, *source.batch(number))
        patching.unpatch(model)
    torch.manual_seed(options.seed)
    name, old = head(model)
    new = nn.Linear(old.in_features, len(data.classes), device=old.weight.device)
    nn.init.trunc_normal_(new.weight, std=0.02)
    nn.init.zeros_(new.bias)
    model.set_submodule(name, new)
    freeze(model, options.finetune)
    model.zero_grad()
    return data, model


def head(model: nn.Module) -> tuple[str, nn.Linear]:
    """The classifier: the linear layer that comes last."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError("demo: finetune needs a model whose classifier is a linear layer")
    return linears[-1]


def load(model: nn.Module, path: Path) -> None:
    """Weights from a state_dict, plain or under "model" or "state_dict"; the head's are left out."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = next((state[k] for k in ("model", "state_dict") if isinstance(state.get(k), dict)), state)
    name, _ = head(model)
    state = {k: v for k, v in state.items() if not k.startswith(f"{name}.")}
    try:
        found = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"demo: {path} does not fit the model: {error}") from None
    missing = [k for k in found.missing_keys if not k.startswith(f"{name}.")]
    if missing or found.unexpected_keys:
        raise ValueError(f"demo: {path} is of another model: missing {missing[:3]}, unexpected {found.unexpected_keys[:3]}")


def stages(model: nn.Module) -> list[list[nn.Module]]:
    """The modules of each stage, in order; the last stage has what follows it too."""
    children = dict(model.named_children())
    for name in SEQUENCES:
        if isinstance(children.get(name), (nn.Sequential, nn.ModuleList)):
            found, last = [[stage] for stage in children[name]], name
            break
    else:
        numbered = [name for name in children if name.startswith("layer") and name[5:].isdigit()]
        if not numbered:
            raise ValueError(f"demo: finetune=last-N needs a model with {', '.join(SEQUENCES)} or layer1, layer2, ...; use linear or all")
        found, last = [[children[name]] for name in numbered], numbered[-1]
    names = list(children)
    for name in names[: names.index(last)]:  # lists of what comes before each stage: ConvNeXt's downsampling
        if isinstance(children[name], nn.ModuleList) and len(children[name]) == len(found):
            for stage, module in zip(found, children[name]):
                stage.append(module)
    found[-1] += [children[name] for name in names[names.index(last) + 1 :]]
    return found


def freeze(model: nn.Module, finetune: str) -> None:
    """Leave gradients to the head ("linear"), to the last N stages and what follows them ("last-N"), or to all."""
    model.train()
    if finetune == "all":
        return
    parts = [head(model)[1]]
    if finetune != "linear":
        count, found = int(finetune.removeprefix("last-")), stages(model)
        if count > len(found):
            raise ValueError(f"demo: finetune={finetune}, but the model has {len(found)} stages")
        parts += [module for stage in found[-count:] for module in stage]
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    _rest(model)


def _rest(module: nn.Module) -> None:
    """What is frozen runs as in evaluation: no stochastic depth, no statistics of batches."""
    if any(p.requires_grad for p in module.parameters()):
        for child in module.children():
            if len(list(child.parameters())):
                _rest(child)
    else:
        module.eval()
