"""The command line: fastconv doctor | models | demo | bench."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

try:
    import rich  # noqa: F401  (the demo and typer print with it)
    import typer
except ImportError as error:
    raise SystemExit(f'fastconv: the command line needs {error.name}: pip install "fastconv[cli]"') from None

from . import doctor as _doctor
from . import zoo
from .models import MODELS
from .published import show

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def doctor() -> None:
    """Show versions, what is built, and which backend can run which op here."""
    _doctor.main()


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help='shell pattern; with a prefix, other libraries: "timm:convnext*"')] = "*",
    published: Annotated[bool, typer.Option("--published", help="the ConvNeXt paper's comparison table, counted again")] = False,
) -> None:
    """List the models that fastconv.create_model builds."""
    if published:
        show(pattern)
        return
    try:
        names = zoo.list_models(pattern)
    except (ValueError, ImportError) as error:
        raise _failed(error) from None
    if not names:
        raise _failed(f"no model matches {pattern!r}")
    if ":" in pattern:
        print(*names, sep="\n")
        return
    width = max(map(len, names))
    print(f"{'name':<{width}} {'family':<19} {'params M':>8} {'GMACs':>6} {'image':>5}  ops")
    for name in names:
        spec = MODELS[name]
        print(f"{name:<{width}} {spec.family:<19} {spec.params:8.2f} {spec.gmacs:6.2f} {spec.resolution:5}  {', '.join(spec.ops)}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run the benchmarks of a checkout; further arguments go to pytest."""
    benchmarks = Path(__file__).resolve().parents[1] / "benchmarks"
    if not (benchmarks / "pytest.ini").is_file():
        raise _failed("the benchmarks are not part of the installed package: clone the fastconv repository and run `fastconv bench` there")
    raise typer.Exit(subprocess.call([sys.executable, "-m", "pytest", str(benchmarks), *context.args]))


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="any name that fastconv.create_model takes; default: convnext_tiny, with --pretrain convnextv2_atto")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="a folder with one folder of images a class; default: scikit-learn's digits")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 or float16 by autocast")] = "float32",
    batch_size: Annotated[int, typer.Option(help="images a step, an even number")] = 16,
    steps: Annotated[int, typer.Option(help="training steps of each run")] = 48,
    image_size: Annotated[int | None, typer.Option(help="height and width of the images; default: 64, with --pretrain 128")] = None,
    seed: Annotated[int, typer.Option(help="of weights, batches and stochastic depth")] = 0,
    output: Annotated[Path | None, typer.Option(help="where the picture goes; default: fastconv-demo.png, fastconv-pretrain.png")] = None,
    pretrain: Annotated[
        bool,
        typer.Option("--pretrain", help="masked pretraining of a ConvNeXt V2 or of mae_vit_base_patch16"),
    ] = False,
    finetune: Annotated[
        str | None, typer.Option(help="transfer learning: linear (a new head alone), last-N (N stages and the head) or all")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="state_dict to fine-tune; default: trained here first, on half of the classes")
    ] = None,
) -> None:
    """Train a model on real images as it came and patched; exit with 1 if the losses differ or a block is not fused."""
    model = model or ("convnextv2_atto" if pretrain else "convnext_tiny")
    image_size = image_size or (128 if pretrain else 64)
    output = output or Path("fastconv-pretrain.png" if pretrain else "fastconv-demo.png")
    try:
        from . import demo as _demo

        options = _demo.Options(model, data, device, dtype, batch_size, steps, image_size, seed, output, pretrain, finetune, weights)
        data_and_model = _demo.prepare(options)
    except (ValueError, ImportError, FileNotFoundError) as error:
        raise _failed(error) from None
    raise typer.Exit(_demo.demo(options, *data_and_model))


def _failed(reason: object) -> typer.Exit:
    print(f"fastconv: {reason}", file=sys.stderr)
    return typer.Exit(2)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
