"""Which kernels of attention have right gradients on this GPU, and what they cost: a row a kernel, in Markdown.

The error is that of the gradients of queries, keys and values in bfloat16, relative to those in float32 by PyTorch's
plain kernel. The gradient of the output arrives laid out as the output, or as a slice, which is what it is where the
output is concatenated with something, as in FLUX's single blocks.

    python benchmarks/attention_gradients.py  # 2 images of 1,152 tokens, 24 heads of 128: FLUX.1-dev at 512 pixels
    python benchmarks/attention_gradients.py --tokens 24 --heads 2  # on a CPU, to try it; kernels that it lacks say so
"""

import argparse
import time

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


KERNELS = {
    "PyTorch's choice": list(SDPBackend.__members__.values())[1:],  # all but ERROR
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
REST = 64  # channels that the output is concatenated with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"images": 2, "tokens": 1152, "heads": 24, "width": 128, "repeats": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = torch.randn(3, args.images, args.tokens, args.heads, args.width, device=device, dtype=torch.bfloat16)
    channels = args.heads * args.width
    weight = torch.randn(channels + REST, channels, device=device, dtype=torch.bfloat16) / channels**0.5
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else device}\n")  # noqa: T201
    print("| kernel | laid out as the output | a slice | ms, both passes, of a slice |\n|---|---|---|---|")  # noqa: T201
    for name, kernel in KERNELS.items():
        try:
            errors = [error(inputs, weight, kernel, is_slice) for is_slice in (False, True)]
            shown = f"{errors[0]} | {errors[1]} | {1e3 * seconds(inputs, weight, kernel, args.repeats):.2f}"
        except RuntimeError as failure:
            shown = f"{str(failure).splitlines()[0]} | |"
        print(f"| {name} | {shown} |")  # noqa: T201


def gradients(inputs: Tensor, weight: Tensor, kernel: object, is_slice: bool) -> Tensor:
    """Of queries, keys and values: (3, images, tokens, heads, width)."""
    leaf = inputs.detach().requires_grad_()
    with sdpa_kernel(kernel):
        attended = scaled_dot_product_attention(*leaf.transpose(2, 3)).transpose(1, 2).flatten(2)
        if is_slice:
            attended = torch.cat([attended, attended.new_ones(*attended.shape[:2], REST)], 2)
        out = attended @ weight[: attended.shape[2]]
        return torch.autograd.grad(out.float().square().mean(), leaf)[0]


def error(inputs: Tensor, weight: Tensor, kernel: object, is_slice: bool) -> str:
    exact = gradients(inputs.float(), weight.float(), SDPBackend.MATH, is_slice)
    pairs = zip(gradients(inputs, weight, kernel, is_slice).float(), exact, strict=True)
    return ", ".join(f"{float((computed - right).norm() / right.norm()):.0e}" for computed, right in pairs)


def seconds(inputs: Tensor, weight: Tensor, kernel: object, repeats: int) -> float:
    """Of both passes, after those that have warmed up; the result is read, which waits for the device."""
    start = time.perf_counter()
    for _ in range(repeats):
        gradients(inputs, weight, kernel, is_slice=True)[0, 0, 0, 0, 0].item()
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    main()
