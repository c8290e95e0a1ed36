"""How cria was made: its text, its tokenizer and its training. Nothing here is needed to serve it."""
