"""``python -m penstock.serve.link`` is the process of an engine; see :mod:`~penstock.serve.link.process`."""

from penstock.core.garbage import loading

with loading():
    import transformers  # noqa: F401 - every engine opens a tokenizer

    from penstock.serve.link.process import main

main()
