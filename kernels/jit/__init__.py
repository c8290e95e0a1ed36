"""Native code written in Python: LLVM's instructions emitted by ordinary loops, compiled on this machine and kept on
its disk, run by a few threads. Knows no model and no kernel."""
