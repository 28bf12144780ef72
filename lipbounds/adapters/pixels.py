"""Normalisation by mean and standard deviation as part of a network, so that its input, and every radius, is in pixels.

A network that begins with windows of the image and a linear map of each, as a patch embedding does, takes
(x - mean) / std into that map without another layer and without loss: W (p - m) / s + b = (W / s) p + (b - W (m / s)).
"""

from __future__ import annotations

from collections.abc import Sequence as Numbers

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.errors import InvalidInput, Unsupported
from lipbounds.targets.layers import Linear, Patches, Sequence


def network_of_pixels(
    network: Sequence, mean: float | Numbers[float] | Tensor, std: float | Numbers[float] | Tensor
) -> Sequence:
    """The network as a function of pixels, for a network of normalised pixels (pixels - mean) / std.

    Args:
        network: begins with Patches without padding and a Linear; its images are normalised.
        mean: of each channel, or of all, in the unit of the pixels: for pixels in [0, 1] those of the image processor.
        std: standard deviation of each channel, or of all; > 0.

    Returns:
        A network in float64 that takes pixels. Its constants and radii are in the l2 norm of the pixels.

    Raises:
        InvalidInput: `mean` or `std` is not finite or not one number per channel, or `std` is not positive.
        Unsupported: the network begins with other layers, or pads, which puts zeros where normalised pixels are zero.
    """
    layers = list(network.layers) if isinstance(network, Sequence) else []
    first, second = (*layers[:2], None, None)[:2]
    if not isinstance(first, Patches) or not isinstance(second, Linear) or first.padding != (0, 0):
        raise Unsupported(
            "network must begin with Patches without padding and then a Linear, which takes the normalisation in, got "
            f"{[layer.description for layer in layers[:2]]}; divide the Jacobian of your first layer by std yourself."
        )
    weight = second.weight.double()
    entries = first.size[0] * first.size[1]
    channels = weight.shape[1] // entries
    mean, std = (_by_channel(name, given, channels, weight) for name, given in (("mean", mean), ("std", std)))
    if not bool((std > 0).all()):
        raise InvalidInput(f"std must be positive, got {std.tolist()}.")
    # A window is read channel by channel, as torch.nn.functional.unfold does.
    mean, std = (values.repeat_interleave(entries) for values in (mean, std))
    bias = -weight @ (mean / std)
    bias = bias if second.bias is None else second.bias.double() + bias
    rest = Sequence(tuple(layers[2:]), network.names[2:]).to(torch.float64).layers if layers[2:] else ()
    return Sequence((first, Linear(weight / std, bias), *rest), network.names)


def _by_channel(name: str, given: float | Numbers[float] | Tensor, channels: int, like: Tensor) -> Float[Tensor, " c"]:
    try:
        values = torch.as_tensor(given, dtype=like.dtype, device=like.device).flatten()
        values = values.expand(channels).contiguous()
    except (RuntimeError, TypeError, ValueError) as error:
        raise InvalidInput(f"{name} must be one number, or one per channel ({channels}), got {given!r}.") from error
    if not bool(values.isfinite().all()):
        raise InvalidInput(f"{name} must be finite, got {values.tolist()}.")
    return values
