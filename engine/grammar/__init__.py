"""Structured outputs: which tokens may come next, so that a completion's text is what its Grammar says.

    compiler = GrammarCompiler(vocabulary, eos_token_ids, vocab_size)   one an engine, and one in the server's process
    compiler.check(grammar)                       the server's: raises what the client is told, within a second
    matcher = compiler.compile(grammar)           the engine's, in a thread: some milliseconds; one matcher a sequence
    mask = compiler.fill([matcher, ...], [budget, ...])     each step, while the forward runs
    matcher.accept(token)                         each sampled token, EOS included
    matcher.done                                  nothing can follow: the sequence ends, with reason "stop"

Knows tokens and bytes; no logits, no sequence, no schedule. The grammar library's own types stay inside this folder.
"""

from pronk.engine.grammar.compiler import GrammarCompiler
from pronk.engine.grammar.matcher import Mask, Matcher

__all__ = ["GrammarCompiler", "Mask", "Matcher"]
