"""lm-eval's client for /v1/completions, with the server's own tokenizer: scores of continuations, without any task or
download."""

import sys

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

model = LocalCompletionsAPI(
    model="cria",
    base_url=f"{sys.argv[1].removesuffix('/')}/completions",
    tokenizer_backend="remote",
    batch_size=2,
)
pairs = [("Hello", " world"), ("3 plus 4 is", " 7"), ("Tell me", " more")]
requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
scores = model.loglikelihood(requests)
assert len(scores) == 3
assert all(score < 0 for score, _ in scores), scores
text = model.generate_until([Instance("generate_until", {}, ("Hello", {"until": ["."], "max_gen_toks": 5}), 0)])
assert len(text) == 1
print("lm-eval: log likelihoods and generation")
