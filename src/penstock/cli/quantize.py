"""``penstock quantize``: writes a model in fewer bits."""

from __future__ import annotations

from pathlib import Path

import typer


def quantize(
    model: str = typer.Argument(..., help="A model or run folder, a GGUF file, a boxed model or a hub name."),
    scheme: str = typer.Option(..., "--scheme", help="fp8, int8 (both W8A8) or w4a16."),
    out: Path = typer.Option(..., "--out", "-o", metavar="FOLDER", help="The folder to write."),
) -> None:
    """Write a model with the matrices of its layers quantized, rounded to nearest, as a Hugging Face folder.

    The folder is in the format of compressed-tensors, which transformers and Penstock read. Embedding, head,
    norms and routers stay as they are. Nothing is calibrated: these schemes scale activations token by token.

    Example: `penstock quantize smollm2 --scheme w4a16 --out smollm2-w4a16`
    """
    import torch

    from penstock.core.errors import UsageError
    from penstock.core.files import atomic_folder
    from penstock.models import hub
    from penstock.models.companions import copy_companions

    if out.exists():
        raise UsageError(f"{out} exists already", hint="Name another folder, or remove it.")
    folder = hub.resolve(model)
    if hub.is_quantized(folder):
        typer.echo(
            f"{model} is quantized already: what it lost stays lost, and rounding it again loses more.", err=True
        )
    dtype = hub.dtype_of(folder)
    decoder = hub.load(folder, dtype=torch.bfloat16 if dtype == torch.float32 else dtype)
    with atomic_folder(out) as fresh:
        hub.save(decoder, fresh, scheme=scheme)
        copy_companions(folder, fresh)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    typer.echo(f"{out}: {decoder.parameter_count() / 1e6:.4g} M weights in {size / 1e6:.4g} MB")
