"""aiter.ops.moe_op: the place of `topk_softmax`."""

from aiter.ops.topk import topk_softmax as topk_softmax
