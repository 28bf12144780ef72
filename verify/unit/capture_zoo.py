"""Attention as people write it: small modules, each with what capture must say of it."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verify.unit.capture_models import DIM, HEADS, TRIANGLE, WIDTH, Fused


INNER = HEADS * WIDTH


class Written(nn.Module):
    """Three layers, the heads, an output layer; what is in between is given as functions."""

    def __init__(
        self,
        scores: Callable[[Tensor, Tensor], Tensor] = lambda q, k: q @ k.mT / 2,
        maps: Callable[[Tensor], Tensor] = lambda s: s.softmax(-1),
        mix: Callable[[Tensor, Tensor], Tensor] = lambda p, v: p @ v,
        parts: Callable[..., Any] = lambda q, k, v: (q, k, v),
        after: Callable[[Tensor], Tensor] = lambda o: o,
        project: bool = True,
    ) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, INNER) for _ in range(3))
        self.out = nn.Linear(INNER, DIM) if project else nn.Identity()
        self.scores, self.maps, self.mix, self.parts, self.after = scores, maps, mix, parts, after

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, WIDTH)).transpose(-3, -2) for layer in (self.q, self.k, self.v))
        q, k, v = self.parts(q, k, v)
        mixed = self.after(self.mix(self.maps(self.scores(q, k)), v))
        return self.out(mixed.transpose(-3, -2).flatten(-2))


class Einsum(nn.Module):
    """Every product is an einsum, weights have a dimension for the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.w_q, self.w_k, self.w_v = (nn.Parameter(torch.randn(DIM, HEADS, WIDTH)) for _ in range(3))
        self.w_o, self.b_q = nn.Parameter(torch.randn(HEADS, WIDTH, DIM)), nn.Parameter(torch.randn(HEADS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("bnd,dhk->bnhk", x, self.w_q) + self.b_q
        k, v = (torch.einsum("... d, d h k -> ... h k", x, w) for w in (self.w_k, self.w_v))
        maps = torch.einsum("bihd,bjhd->bhij", q, k).mul(0.4).softmax(-1)
        return torch.einsum("bhij,bjhd,hdo->bio", maps, v, self.w_o)


class EinsumKeysFirst(nn.Module):
    """Scores with keys before queries, softmax over a dimension in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * INNER), nn.Linear(INNER, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).unbind(-3)
        maps = torch.einsum("bihd,bjhd->bjih", q, k).softmax(1)
        return self.out(torch.einsum("bjih,bjhd->bihd", maps, v).flatten(-2))


class Lora(nn.Module):
    """A layer and a low-rank one beside it."""

    def __init__(self, inside: int, outside: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(inside, outside)
        self.a, self.b = nn.Linear(inside, rank, bias=False), nn.Linear(rank, outside, bias=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(self.drop(x))) * 0.5


def with_lora(*names: str) -> nn.Module:
    model = Written()
    for name in names:
        layer = getattr(model, name)
        setattr(model, name, Lora(layer.in_features, layer.out_features))
    return model


def low_rank() -> nn.Module:
    model = Written()
    model.q = nn.Sequential(nn.Linear(DIM, 3), nn.Linear(3, INNER))
    return model


class HeadList(nn.Module):
    """One module a head, put side by side."""

    def __init__(self, how: str = "cat", project: bool = True) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.ModuleList(nn.Linear(DIM, WIDTH) for _ in range(3)) for _ in range(HEADS))
        self.out, self.how = nn.Linear(INNER, DIM) if project else nn.Identity(), how

    def forward(self, x: Tensor) -> Tensor:
        mixed = []
        for number, (q, k, v) in enumerate(self.heads):
            maps = (q(x) @ k(x).mT / (1.5 + number)).masked_fill(~TRIANGLE, -torch.inf).softmax(-1)
            mixed.append(maps @ v(x))
        return self.out(torch.cat(mixed, -1) if self.how == "cat" else torch.stack(mixed, -2).flatten(-2))


class HeadModules(nn.Module):
    """A head is a module of its own, with its mask in a buffer; a layer projects what all of them return."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(DIM, WIDTH, bias=False) for _ in range(3))
            self.register_buffer("tril", torch.tril(torch.ones(8, 8)))
            self.dropout = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            k, q, t = self.key(x), self.query(x), x.shape[1]
            scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
            scores = scores.masked_fill(self.get_buffer("tril")[:t, :t] == 0, float("-inf"))
            return self.dropout(F.softmax(scores, dim=-1)) @ self.value(x)

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(HeadModules.Head() for _ in range(HEADS))
        self.proj, self.dropout = nn.Linear(INNER, DIM), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.proj(torch.cat([head(x) for head in self.heads], dim=-1)))


class OneHead(nn.Module):
    """No output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, INNER) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).mT / 3).softmax(-1) @ self.v(x)


class Image(nn.Module):
    """Attention over places as diffusion models write it; `how` is the last product."""

    def __init__(self, how: str = "bmm", groups: int = 1) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(DIM, DIM, 1, groups=groups) for _ in range(3))
        self.out, self.how = nn.Conv2d(DIM, DIM, 1), how

    def forward(self, image: Tensor) -> Tensor:
        b, c, h, w = image.shape
        q, k, v = self.q(image), self.k(image), self.v(image)
        q, k, v = q.reshape(b, c, h * w).permute(0, 2, 1), k.reshape(b, c, h * w), v.reshape(b, c, h * w)
        maps = (torch.bmm(q, k) * c**-0.5).softmax(2)
        mixed = torch.bmm(v, maps.permute(0, 2, 1)) if self.how == "bmm" else torch.einsum("bij,bcj->bci", maps, v)
        return self.out(mixed.reshape(b, c, h, w))


class Norms(nn.Module):
    """Batch normalisation after each projection, in evaluation; a bias added after reshaping."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, INNER, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(INNER) for _ in range(3))
        self.bias, self.out = nn.Parameter(torch.randn(HEADS, 1, WIDTH)), nn.Linear(INNER, DIM)
        for norm in self.norms:
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            norm(layer(x).flatten(0, 1)).view(*x.shape[:2], HEADS, WIDTH).transpose(1, 2)
            for layer, norm in zip(self.layers, self.norms, strict=True)
        )
        return self.out(F.scaled_dot_product_attention(q + self.bias, k, v).transpose(1, 2).flatten(-2))


class Slices(Fused):
    """Rotary positions written into slices, of a copy or of the queries themselves."""

    def __init__(self, own: bool) -> None:
        super().__init__(change=lambda q, k, v: (self.turned(q), self.turned(k), v))
        self.own = own

    def turned(self, t: Tensor) -> Tensor:
        angle = torch.arange(t.shape[-2])[:, None] * torch.tensor([0.3, 0.7])
        first, second = t[..., 0::2], t[..., 1::2]
        new = torch.empty_like(t) if self.own else t.clone()
        new[..., 0::2] = first * angle.cos() - second * angle.sin()
        new[..., 1::2] = first * angle.sin() + second * angle.cos()
        return new


class Scored(nn.Module):
    """A softmax that is no attention beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.pool, self.slots = Fused(), nn.Linear(DIM, 1), nn.Parameter(torch.randn(DIM, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        slots = (x @ self.slots).softmax(-2).mT @ x
        return (self.pool(x).softmax(-2).mT @ x).squeeze(-2) + slots.mean(-2)


class ClassToken(nn.Module):
    """The query is one of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x[:, :1]), self.k(x), self.v(x)
        q, k, v = (t.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class TalkingHeads(nn.Module):
    """As in the first layers of CaiT: scores of all heads are mixed, then maps; beside attention that can be said."""

    def __init__(self, maps: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.whole = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), Fused()
        self.logits, self.maps = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS) if maps else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).transpose(1, 3).unbind(2)
        maps = self.logits((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        maps = self.maps(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.whole(x + self.out((maps @ v).transpose(1, 2).flatten(-2)))


class Router(nn.Module):
    """Experts chosen by what attention gave, which nothing projected: no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.gate = OneHead(), nn.Linear(INNER, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x + self.attention(x)).softmax(-1)


class Decays(nn.Module):
    """Exponentials of products, as state-space models take them, beside attention."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.v, self.whole = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), Fused()

    def forward(self, x: Tensor) -> Tensor:
        decay = (-F.softplus(self.a(x)) * F.softplus(self.b(x))).exp()
        return self.whole(x + (decay * self.v(x)).cumsum(1))


class LastToken(Fused):
    """Queries of all tokens are made, and one is used."""

    def __init__(self) -> None:
        super().__init__(change=lambda q, k, v: (q[..., -1:, :], k, v))


class ClassAttention(nn.Module):
    """As in CaiT: the class token looks at itself and at all patches, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, DIM))
        self.norm, self.scale = nn.LayerNorm(DIM), WIDTH**-0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(len(x), -1, -1)
        u = self.norm(torch.cat((token, x), 1))
        b, n, c = u.shape
        q = self.q(u[:, 0]).unsqueeze(1).reshape(b, 1, HEADS, c // HEADS).permute(0, 2, 1, 3)
        k = self.k(u).reshape(b, n, HEADS, c // HEADS).permute(0, 2, 1, 3)
        v = self.v(u).reshape(b, n, HEADS, c // HEADS).permute(0, 2, 1, 3)
        maps = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return token + self.proj((maps @ v).transpose(1, 2).reshape(b, 1, c))


class Local(nn.Module):
    """Attention in overlapping pieces, which no Attention says, beside one that can be said."""

    def __init__(self, piece: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.piece, self.whole = nn.Linear(DIM, 3 * DIM), piece, Fused()

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x + self.piece(*self.qkv(x).chunk(3, -1)))


def spread(p: Tensor, v: Tensor) -> Tensor:
    return (p.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def in_place(scores: Tensor) -> Tensor:
    scores /= 1.3
    scores += torch.arange(6.0)
    scores.masked_fill_(~TRIANGLE, -torch.inf)
    return scores.softmax(-1)


def assigned(scores: Tensor) -> Tensor:
    scores[..., ~TRIANGLE] = -torch.inf
    return scores.softmax(-1)


def stretched(scores: Tensor) -> Tensor:
    """As in LayoutLMv3, after CogView."""
    scores = scores + torch.arange(6.0) / 2
    scaled = scores / 32
    return ((scaled - scaled.amax(-1).unsqueeze(-1)) * 32).softmax(-1)


def named_einsum(*given: Any) -> Tensor:
    """What einops.einsum(*tensors, pattern) comes to: names become letters, and torch does the rest."""
    *tensors, pattern = given
    names = sorted(set(pattern.replace(",", " ").replace("->", " ").split()))
    letters = dict(zip(names, "abcdefghij", strict=False))
    words = pattern.replace(",", " , ").split()
    return torch.einsum("".join(letters.get(word, word) for word in words), *tensors)


def exponentials(scores: Tensor) -> Tensor:
    e = (scores - scores.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def mask_times(scores: Tensor) -> Tensor:
    mask = TRIANGLE.double()
    return (scores * mask - 1e4 * (1 - mask)).softmax(-1)


def root_mean_square(how: str) -> Callable[[Tensor], Tensor]:
    return {
        "divided by a root": lambda t: t / torch.sqrt((t * t).mean(-1, keepdim=True) + 1e-3),
        "product": lambda t: t * torch.rsqrt((t * t).mean(-1, keepdim=True) + 1e-3),
        "eps first": lambda t: t * (1e-3 + t.square().mean(-1, keepdim=True)).rsqrt(),
        "power": lambda t: t * (t**2).mean(-1, True).add(1e-3) ** -0.5,
    }[how]


def normed(how: str) -> nn.Module:
    norm = root_mean_square(how)
    return Written(parts=lambda q, k, v: (norm(q), norm(k), v))


def with_factors() -> nn.Module:
    model = Written()
    t, wide, out = (nn.Parameter(torch.rand(HEADS, 1, width) + 0.5) for width in (1, WIDTH, 1))
    model.t, model.wide, model.gain = t, wide, out
    model.parts = lambda q, k, v: (q * t, k * wide, v * wide)
    model.scores = lambda q, k: q @ k.mT * t
    model.after = lambda o: o * out
    return model


@dc.dataclass(frozen=True, kw_only=True)
class Case:
    """A module, the number of its attention maps by construction, of captured blocks, and what is said of others."""

    make: Callable[[], nn.Module]
    maps: int = 1
    blocks: int = 1
    heads: int = 1  # softmaxes that are one map: heads computed one by one
    reported: str = ""
    image: bool = False
    projected: bool = True
    whole: bool = True  # the module is one block, so that their Jacobians are comparable


_SAID = {
    "einsum": Einsum,
    "einsum, keys first": EinsumKeysFirst,
    "in place": lambda: Written(maps=in_place),
    "assigned": lambda: Written(maps=assigned),
    "baddbmm": lambda: Written(
        scores=lambda q, k: torch.baddbmm(
            torch.arange(6.0), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5, alpha=0.3
        ).unflatten(0, (-1, HEADS))
    ),
    "exponentials": lambda: Written(maps=exponentials),
    "exp / sum": lambda: Written(maps=lambda s: s.exp() / s.exp().sum(-1, keepdim=True)),
    "log_softmax": lambda: Written(maps=lambda s: s.log_softmax(-1).exp()),
    "maximum taken off": lambda: Written(maps=lambda s: (s - s.max(-1, keepdim=True).values).softmax(-1)),
    "stretched": lambda: Written(maps=stretched),
    "named einsum": lambda: Written(
        scores=lambda q, k: named_einsum(q, k, "batch head query width, batch head key width -> batch head query key"),
        mix=lambda p, v: named_einsum(p, v, "batch head query key, batch head key width -> batch head query width"),
    ),
    "mask times scores": lambda: Written(maps=mask_times),
    "operator": lambda: Written(maps=lambda s: torch.ops.aten.softmax.int(s, -1)),
    "values first": lambda: Written(mix=lambda p, v: (v.mT @ p.mT).mT),
    "keys first": lambda: Written(
        scores=lambda q, k: k @ q.mT / 2, maps=lambda s: s.softmax(-2), mix=lambda p, v: p.mT @ v
    ),
    "factor of a sum": lambda: Written(maps=lambda s: torch.add(torch.arange(6.0), s, alpha=2).softmax(-1)),
    "lora": lambda: with_lora("q", "v"),
    "lora on the output": lambda: with_lora("q", "k", "v", "out"),
    "low rank": low_rank,
    "batch norm and late bias": Norms,
    "slices": lambda: Slices(own=True),
    "slices of a copy": lambda: Slices(own=False),
    "factors": with_factors,
    **{f"norm: {how}": (lambda how=how: normed(how)) for how in ("divided by a root", "product", "eps first", "power")},
}
ZOO: dict[str, Case] = {
    **{name: Case(make=make) for name, make in _SAID.items()},
    "heads in a list": Case(make=HeadList, heads=HEADS),
    "heads in a stack": Case(make=lambda: HeadList("stack"), heads=HEADS),
    "head modules": Case(make=HeadModules, heads=HEADS),
    "one head": Case(make=OneHead, projected=False),
    "no projection": Case(make=lambda: Written(project=False), projected=False),
    "heads in a list, no projection": Case(make=lambda: HeadList(project=False), projected=False, heads=HEADS),
    "image": Case(make=Image, image=True),
    "image, einsum": Case(make=lambda: Image("einsum"), image=True),
    "image, groups": Case(make=lambda: Image(groups=2), image=True),
    "fused operator": Case(
        make=lambda: Local(lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v)),
        maps=2,
        blocks=1,
        reported="the output must go into a linear projection",
        whole=False,
    ),
    "no attention": Case(make=Scored, whole=False),
    "routing after attention": Case(make=Router, projected=False, whole=False),
    "decays": Case(make=Decays, whole=False),
    "talking heads": Case(
        make=lambda: TalkingHeads(maps=True),
        maps=2,
        reported="got torch.nn.functional.linear in between",
        whole=False,
    ),
    "talking heads before the softmax": Case(
        make=lambda: TalkingHeads(maps=False), maps=2, reported="the logits must be a product of queries", whole=False
    ),
    "map times values": Case(
        make=lambda: Local(lambda q, k, v: spread((q @ k.mT).softmax(-1), v)),
        maps=2,
        reported="got torch.Tensor.mul in between",
        whole=False,
    ),
    "pieces": Case(
        make=lambda: Local(
            lambda q, k, v: spread(torch.einsum("bid,bjd->bij", q, k).unfold(-1, 3, 3).softmax(-1).flatten(-2), v)
        ),
        maps=2,
        reported="softmax",
        whole=False,
    ),
    "sums of products": Case(
        make=lambda: Local(lambda q, k, v: (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1).softmax(-1) @ v),
        maps=2,
        reported="the logits must be a product",
        whole=False,
    ),
    "capped": Case(
        make=lambda: Local(lambda q, k, v: (q @ k.mT).tanh().softmax(-1) @ v),
        maps=2,
        reported="got torch.Tensor.tanh in between",
        whole=False,
    ),
    "query of the class token": Case(make=ClassToken),
    "query of the last token": Case(make=LastToken),
    "class attention": Case(make=ClassAttention, whole=False),
}


def inputs_of(case: Case) -> Tensor:
    return torch.randn(2, DIM, 2, 3) if case.image else torch.randn(3, 6, DIM)
