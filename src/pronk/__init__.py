"""Pronk: an OpenAI-compatible inference server for the Llama 3.2 family.

server/  OpenAI's protocol over HTTP. Knows text and JSON; never a tensor.
engine/  Token ids in, token ids out. Knows nothing of HTTP or OpenAI.
kernels/ Tensors in, tensors out. Knows nothing of requests.
"""

__version__ = "0.1.0"
