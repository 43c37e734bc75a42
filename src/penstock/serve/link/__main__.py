"""``python -m penstock.serve.link`` is the process of an engine; see :mod:`~penstock.serve.link.process`."""

from penstock.core.garbage import loading
from penstock.core.processor import share_cores

share_cores()  # before PyTorch is there: other engines, and the server itself, want cores, too
with loading():
    # In this order. PyTorch names what it has compiled by the first module in which a name is found, and transformers
    # had modules (until 5.17 at least) that import half of it whatever name they are asked for.
    import torch  # noqa: F401
    import transformers  # noqa: F401 - every engine opens a tokenizer

    from penstock.serve.link.process import main

main()
