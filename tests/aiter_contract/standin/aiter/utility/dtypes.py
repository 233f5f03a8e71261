"""aiter.dtypes: `fp8` is the format of the device's arch."""

import torch
from aiter import _standin

fp8 = _standin.device.fp8
fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
i8, i16, i32, i64 = torch.int8, torch.int16, torch.int32, torch.int64
u8, u32, u64 = torch.uint8, torch.uint32, torch.uint64
