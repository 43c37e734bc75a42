"""How weights stand on disk: safetensors, GGUF."""
