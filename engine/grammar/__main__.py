"""python -m pronk.engine.grammar: a judge's process (`judge.py`)."""

from pronk.engine.grammar.judge import main

main()
