"""cria, the embedded default model: a small real Llama 3.2 checkpoint, and the recipe that made it."""
