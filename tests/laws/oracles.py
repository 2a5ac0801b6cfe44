"""Every method's equation once more, written densely in float64 and sharing nothing with the library's code.

A matrix method's oracle maps (W, b) and its trained tensors to (W′, b′); that of a hidden method maps a module's input
and output to the new output. Trained copies of base tensors need none: the check puts them into a plain model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from inlay.core.method import Method


@dataclass
class Given:
    """What an oracle sees of a built method: its options and tensors, frozen shared ones, and what it is made of."""

    name: str
    options: dict
    tensors: dict[str, Tensor]
    shared: dict[str, Tensor]
    inner: Given | None = field(default=None)
    frozen: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of its own that are not trained."""
    common: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that all sites of the method train together."""

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


Pair = tuple[Tensor, Tensor | None]
Rule = Callable[[Tensor, Tensor], Tensor]


def given(method: Method, shared: dict[str, Tensor]) -> Given:
    """Read a built method: plain tensors in float64."""
    held = dict(method.named_parameters()) | method.states()
    own = {n: p.detach().double() for n, p in held.items() if not n.startswith("of.")}
    options, path, name = method.fields(), method.site.path, method.site.name
    if "feedforward" in options:  # which of IA3's two equations holds is a matter of where it sits
        options["on_input"] = any(path.endswith(n) or name.endswith(n) for n in options["feedforward"])
    options["channels"] = isinstance(method.site.module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    options["kernel"] = getattr(method.site.module, "kernel_size", ())
    options["embedding"] = isinstance(method.site.module, nn.Embedding)
    of = options.get("of")
    wide = {n: t.double() for n, t in shared.items()}
    frozen = {n: t.detach().double() for n, t in method.named_buffers() if not n.startswith("of.")}
    common = {
        n.removeprefix("own_"): p.detach().double()
        for peer in method.site.peers for built in peer.built.values()
        for n, p in built.named_parameters() if n.startswith("own_")
    }  # fmt: skip
    return Given(method.name(), options, own, wide, None if of is None else given(of, shared), frozen, common)


# ---------------------------------------------------------------------- methods on matrices
def lora(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W + s B A and b + s b₀, s = α/r or α/√r."""
    r, alpha = g.options["r"], g.options["alpha"]
    scale = alpha / r**0.5 if g.options["rank_stabilized"] else alpha / r
    return W + scale * (g["B"] @ g["A"]), b if b is None or "b" not in g.tensors else b + scale * g["b"]


def lorafa(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W + s B A with A as it was drawn."""
    return W + g.options["alpha"] / g.options["r"] * g["B"] @ g.frozen["A"], b


def loha(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W + s (B₁ A₁) ⊙ (B₂ A₂), rebuilt tap by tap where the kernel has a core."""
    sides = []
    for k in "12":
        A = g["A" + k]
        if "T" + k in g.tensors:
            A = torch.stack([g["T" + k][:, :, t] @ A for t in range(g["T" + k].shape[2])], -1).reshape(len(A), -1)
        sides.append(g["B" + k] @ A)
    return W + g.options["alpha"] / g.options["r"] * sides[0] * sides[1], b


def lokr(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W + s C ⊗ D, D on its own kernel."""
    C = g["C"] if "C" in g.tensors else g["C1"] @ g["C2"]
    if "D" in g.tensors:
        D = g["D"]
    else:
        A = g["A"]
        if "T" in g.tensors:
            A = torch.stack([g["T"][:, :, t] @ A for t in range(g["T"].shape[2])], -1).reshape(len(A), -1)
        D = g["B"] @ A
    rows = [torch.cat([c * D for c in row], 1) for row in C]
    return W + g.options["alpha"] / g.options["r"] * torch.cat(rows), b


def krona(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W + s A ⊗ B, block by block."""
    blocks = [torch.cat([a * g["B"] for a in row], 1) for row in g["A"]]
    return W + g.options["scale"] * torch.cat(blocks), b


def pissa(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W_res + s B A, the residual from an exact SVD of W."""
    s = g.options["alpha"] / g.options["r"]
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    r = g.options["r"]
    return W - (U[:, :r] * S[:r]) @ Vh[:r] + s * g["B"] @ g["A"], b


def loraxs(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W + s U_r R Σ_r V_rᵀ; of each singular pair the sign is free but for U's largest number being positive."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    r = len(g["R"])
    U, S, Vh = U[:, :r], S[:r], Vh[:r]
    flip = torch.stack([u[u.abs().argmax()].sign() for u in U.T]).diag()
    return W + g.options["alpha"] / g.options["r"] * U @ flip @ g["R"] @ S.diag() @ flip @ Vh, b


def sdt(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """One number after the other: log A (d_inner, N) by channel and state, W_B and W_C (N, d_inner) by state."""
    new = W.clone()
    for k, channel in enumerate(g["channels"].long().tolist()):
        for j, state in enumerate(g["numbers"][k].long().tolist()):
            new[(channel, state) if W.shape[0] > W.shape[1] else (state, channel)] += g["value"][k, j]
    return new, b


def eva(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W + (α/r) B A, whatever rank A has here."""
    return W + g.options["alpha"] / g.options["r"] * torch.einsum("or,ri->oi", g["B"], g["A"]), b


def corda(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W_res + s B A, without data from an exact SVD of W: the leading part of it, or the last."""
    s, r = g.options["alpha"] / g.options["r"], g.options["r"]
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    part = slice(0, r) if g.options["mode"] == "instruction" else slice(max(0, len(S) - r), len(S))
    return W - U[:, part] @ S[part].diag() @ Vh[part] + s * g["B"] @ g["A"], b


def lorasb(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W + B R A, without data in the leading singular vectors of W."""
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    r = len(g["R"])
    flip = torch.stack([u[u.abs().argmax()].sign() for u in U.T[:r]])
    return W + (U[:, :r] * flip) @ g["R"] @ (Vh[:r] * flip[:, None]), b


def nola(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W + s (Σ b_j B_j) (A₀ + Σ a_i A_i)."""
    (A,), (B,), (A0,) = ([t for n, t in g.shared.items() if n.endswith(end)] for end in ("-A", "-B", "-A0"))
    d_out, d_in = W.shape
    left = sum(c * B[:d_out, :, j] for j, c in enumerate(g["b"]))
    right = A0[:d_in] / d_in**0.5 + sum(c * A[:d_in, :, i] for i, c in enumerate(g["a"]))
    return W + g.options["alpha"] / g.options["r"] * left @ right.T, b


def vblora(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W + B A, piece by piece out of the bank."""
    bank, K = g.common["bank"], g.options["top"]

    def piece(logits: Tensor) -> Tensor:
        best = logits.sort(descending=True).indices[:K]
        return (logits[best].exp() / logits[best].exp().sum()) @ bank[best]

    A = torch.stack([torch.cat([piece(cell) for cell in row]) for row in g["logits_A"]])
    B = torch.cat([torch.stack([piece(cell) for cell in row], 1) for row in g["logits_B"]])
    return W + B @ A, b


def svft(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """U (Σ + M) Vᵀ with M filled in entry by entry."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    flip = torch.stack([u[u.abs().argmax()].sign() for u in U.T])
    U, Vh = U * flip, Vh * flip[:, None]
    n, band, M = len(S), g.options["band"], torch.zeros(len(S), len(S), dtype=W.dtype)
    values = iter(g["M"] * (g["gate"].sigmoid() if "gate" in g.tensors else 1))
    near = [(i, j) for i in range(n) for j in range(n) if abs(i - j) <= band]
    places = {"plain": [(i, i) for i in range(n)], "banded": near}.get(g.options["structure"])
    if places is None:
        places = [divmod(int(at), n) for at in g.frozen["entries"]]
        assert len(set(places)) == len(near)
    for i, j in places:
        M[i, j] = next(values)
    return U @ (S.diag() + M) @ Vh, b


def diablo(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W with blocks added along its diagonal."""
    W, (_, rows, columns) = W.clone(), g["D"].shape
    for k, D in enumerate(g["D"]):
        there = W[k * rows : (k + 1) * rows, k * columns : (k + 1) * columns]
        there += D[: there.shape[0], : there.shape[1]]
    return W, b


def kradapter(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W + s K, or s Kᵀ, with K_i the outer product of V_i and U_i in one row."""
    K = torch.stack([torch.outer(v, u).flatten()[: max(W.shape)] for u, v in zip(g["U"], g["V"], strict=True)])
    return W + g.options["scale"] * (K if W.shape[0] < W.shape[1] else K.T), b


def vera(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W + diag(b) B diag(d) A, with the leading rows and columns of the shared projections."""
    (A,) = (t for n, t in g.shared.items() if n.endswith("-A"))
    (B,) = (t for n, t in g.shared.items() if n.endswith("-B"))
    return W + g["b"].diag() @ B[: W.shape[0]] @ g["d"].diag() @ A[:, : W.shape[1]], b


def dora(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """m ⊙ V / ‖V‖ row by row, V = W + ΔW."""
    assert g.inner is not None
    V, b = ORACLES[g.inner.name](W, b, g.inner)
    return g["m"][:, None] * V / V.norm(dim=1, keepdim=True), b


def dylora(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """The leading n ranks of the inner update, r/n times as strong."""
    assert g.inner is not None
    r = g.inner.options["r"]
    n = g.options["rank"] or r
    cut = {"A": lambda t: t[:n], "B": lambda t: t[:, :n], "d": lambda t: t[:n]}
    tensors = {k: cut[k](t) if k in cut else t for k, t in g.inner.tensors.items()}
    shared = {k: cut[k[-1]](t) for k, t in g.inner.shared.items()}
    V, b = ORACLES[g.inner.name](W, b, replace(g.inner, tensors=tensors, shared=shared))
    return W + r / n * (V - W), b


def deltalora(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W + s·B A + λ s·(B A − B_K A_K) once W moves."""
    assert g.inner is not None
    V, b = ORACLES[g.inner.name](W, b, g.inner)
    then = {"A": g["A_K"], "B": g["B_K"]}
    V_K, _ = ORACLES[g.inner.name](W, None, replace(g.inner, tensors=then))
    return V + g["moving"] * g.options["ratio"] * (V - V_K), b


def relora(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """The inner update over W and what was set aside."""
    assert g.inner is not None
    return ORACLES[g.inner.name](W + g["frozen_B"] @ g["frozen_A"], b, g.inner)


def adalora(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W + (α/r) P diag(E) Q."""
    return W + g.options["alpha"] / (g.options["initial"] or g.options["r"]) * g["P"] @ g["E"].diag() @ g["Q"], b


def ia3(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """diag(l) W and l ⊙ b, or W diag(l) where the input is scaled."""
    if g.options["on_input"]:
        return W * g["l"][None, :], b
    return g["l"][:, None] * W, None if b is None else g["l"] * b


def ssf(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """diag(γ) W and γ ⊙ b + β."""
    return g["gamma"].diag() @ W, None if b is None else g["gamma"] * b + g["beta"]


def sct(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """(I + P W Pᵀ) W and the same of b, with the channels S written into a full matrix."""
    L, S = torch.eye(len(W), dtype=W.dtype), g.frozen["S"].long()
    shift = torch.zeros(len(W), dtype=W.dtype)
    for i, s in enumerate(S):
        shift[s] = g.tensors.get("b", shift)[i]
        for j, t in enumerate(S):
            L[s, t] += g["W"][i, j]
    return L @ W, None if b is None else L @ b + shift


def residualseries(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """(I + A) W and (I + A) b, A block-diagonal where the convolution has groups."""
    L = torch.eye(len(W), dtype=W.dtype) + torch.block_diag(*g["A"].split(g["A"].shape[1]))
    return L @ W, None if b is None else L @ b


def residualparallel(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W with A added to the middle of the kernel, one number of it after another."""
    W, taps = W.clone(), W.shape[1] // g["A"].shape[1]
    sizes, middle = g.options["kernel"], 0
    for k in sizes:
        middle = middle * k + (k - 1) // 2
    for c in range(g["A"].shape[1]):
        W[:, c * taps + middle] += g["A"][:, c]
    return W, b


def weightnorm(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """g ⊙ V/‖V‖ row by row; what is not trained is as it was in W."""
    V = g.tensors.get("v", W)
    lengths = g.tensors.get("g", W.square().sum(1).sqrt())
    return torch.stack([c * v / v.square().sum().sqrt() for c, v in zip(lengths, V, strict=True)]), b


def skewed(values: Tensor, b: int) -> Tensor:
    """A skew-symmetric matrix entry by entry, from those above its diagonal."""
    S, entries = torch.zeros(b, b, dtype=torch.float64), iter(values)
    for i in range(b):
        for j in range(i + 1, b):
            S[i, j] = next(entries)
            S[j, i] = -S[i, j]
    return S


def cayley(S: Tensor, terms: int = 0) -> Tensor:
    """(I + S)(I − S)⁻¹, or with Σ Sⁱ up to Sᵏ⁻² in the place of the inverse."""
    one = torch.eye(len(S), dtype=torch.float64)
    inverse = torch.linalg.inv(one - S)
    if terms:
        inverse = torch.stack([torch.linalg.matrix_power(S, i) for i in range(terms - 1)]).sum(0)
    return (one + S) @ inverse


def oft(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W Rᵀ with R block-diagonal; an embedding's vectors, the columns of W, are turned instead: R⁻¹ W."""
    values, o = g["S"], g.options
    size = round((1 + (1 + 8 * values.shape[1]) ** 0.5) / 2)
    d = W.shape[0] if g.options["embedding"] else W.shape[1]
    blocks = []
    for i in range(d // size):
        S = skewed(values[0 if o["shared"] else i], size)
        if o["constrained"]:
            S = S * min(1.0, o["epsilon"] / len(values) ** 0.5 / float(S.square().sum().sqrt()))
        blocks.append(cayley(S, o["neumann"]))
    R = torch.block_diag(*blocks)
    return (R.T @ W, b) if g.options["embedding"] else (W @ R.T, b)


def boft(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """diag(s) W Rᵀ, R the product of all butterfly factors as full matrices, built from explicit permutations."""
    m, D, entries = g["S"].shape
    size = round((1 + (1 + 8 * entries) ** 0.5) / 2)
    d, R = D * size, torch.eye(D * size, dtype=torch.float64)
    for i in range(m):
        P = torch.zeros(d, d, dtype=torch.float64)
        run, half = size * 2**i, size // 2
        for row in range(d):
            j = row % run
            if i == 0:
                source = j
            else:
                number, rest = divmod(j, half)
                evens = 2**i  # of the 2^(i+1) half blocks in a run
                before = 2 * number if number < evens else 2 * (number - evens) + 1
                source = before * half + rest
            P[row, row - j + source] = 1
        blocks = torch.block_diag(*(cayley(skewed(g["S"][i, k], size)) for k in range(D)))
        R = P @ blocks @ P.T @ R
    s = g.tensors.get("s", torch.ones(W.shape[0], dtype=torch.float64)).diag()
    return (s @ R.T @ W, b) if g.options["embedding"] else (s @ W @ R.T, b)


def road(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """R W and R b, R written entry by entry."""
    d, half, variant = W.shape[0], g.options["group"] // 2, g.options["variant"]
    theta, alpha, R, pair = g["theta"], g["alpha"], torch.eye(d, dtype=torch.float64), 0
    for start in range(0, d - 2 * half + 1, 2 * half):
        for i in range(start, start + half):
            j = i + half
            on = {1: (pair, pair), 2: (i, j), 4: ((0, i), (0, j))}[variant]
            off = {1: (pair, pair), 2: (i, j), 4: ((1, i), (1, j))}[variant]
            R[i, i], R[j, j] = (alpha[k] * theta[k].cos() for k in on)
            R[i, j], R[j, i] = -alpha[off[0]] * theta[off[0]].sin(), alpha[off[1]] * theta[off[1]].sin()
            pair += 1
    return R @ W, None if b is None else R @ b


def plane(u: Tensor) -> Tensor:
    """The projector u uᵀ/‖u‖² of each block, block-diagonal."""
    return torch.block_diag(*(torch.outer(v, v) / v.square().sum() for v in u))


def ether(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W H or H W with H = I − 2 u uᵀ/‖u‖² in blocks."""
    H = torch.eye(g["u"].numel(), dtype=torch.float64) - 2 * plane(g["u"])
    return (H @ W, b) if g.options["side"] == "output" or g.options["embedding"] else (W @ H, b)


def etherplus(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """H₁ W H₂ with H = I − u uᵀ/‖u‖² + v vᵀ/‖v‖² in blocks."""
    if "u_out" in g.tensors:
        W = W - plane(g["u_out"]) @ W + plane(g["v_out"]) @ W
    if "u_in" in g.tensors:
        W = W - W @ plane(g["u_in"]) + W @ plane(g["v_in"])
    return W, b


def glora(W: Tensor, b: Tensor | None, g: Given) -> Pair:
    """W + W ⊙ A + B and b + b ⊙ D + E + W C, every support tensor written out in full."""

    def full(name: str, rows: int, columns: int) -> Tensor:
        if f"{name}_d" in g.tensors:
            return torch.einsum("ir,rj->ij", g[f"{name}_d"], g[f"{name}_u"])
        return g.tensors.get(f"{name}_x", torch.zeros(1, 1, dtype=torch.float64)).expand(rows, columns)

    d_out, d_in = W.shape
    new = W * (1 + full("A", d_out, d_in)) + full("B", d_out, d_in)
    if b is None:
        return new, None
    C, D, E = full("C", d_in, 1)[:, 0], full("D", d_out, 1)[:, 0], full("E", d_out, 1)[:, 0]
    return new, b * (1 + D) + E + (W * C).sum(1)


ORACLES: dict[str, Callable[[Tensor, Tensor | None, Given], Pair]] = {
    "lora": lora, "vera": vera, "dora": dora, "ia3": ia3, "lorafa": lorafa, "loha": loha, "lokr": lokr, "krona": krona,
    "pissa": pissa, "loraxs": loraxs, "nola": nola, "vblora": vblora, "svft": svft, "sdt": sdt, "diablo": diablo,
    "kradapter": kradapter, "eva": eva, "corda": corda, "lorasb": lorasb,
    "dylora": dylora, "adalora": adalora, "deltalora": deltalora, "relora": relora,
    "sct": sct, "residualseries": residualseries, "residualparallel": residualparallel,
    "ssf": ssf, "weightnorm": weightnorm, "oft": oft, "boft": boft, "road": road,
    "ether": ether, "etherplus": etherplus, "glora": glora,
}  # fmt: skip


# ---------------------------------------------------------------------- methods on activations
def bottleneck(g: Given, of_input: bool, normed: bool = False) -> Rule:
    """y + W_up σ(W_down h + b_down) + b_up with h the output, or the input."""
    sigma = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "tanh": torch.tanh}[g.options["activation"]]

    def rule(x: Tensor, y: Tensor) -> Tensor:
        h = (x if of_input else y).double()
        channels = g.options["channels"]  # they come before the places of a map
        h = h.movedim(1, -1) if channels else h
        if normed:
            centred = h - h.mean(-1, keepdim=True)
            h = g["gain"] * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + g["shift"]
        b_down, b_up = (g.tensors.get(name, torch.zeros((), dtype=h.dtype)) for name in ("down_bias", "up_bias"))
        f = sigma(h @ g["down"].T + b_down) @ g["up"].T + b_up
        f = g.options["scale"] * f
        return (y.double() + (f.movedim(-1, 1) if channels else f)).to(y.dtype)

    return rule


def compacter(g: Given) -> Rule:
    """The same with both matrices summed up entry by entry from Kronecker products."""

    def whole(side: str) -> Tensor:
        parts = zip(g.common["A"], g[f"{side}_s"], g[f"{side}_t"], strict=True)
        return torch.stack([torch.kron(A, s @ t) for A, s, t in parts]).sum(0)

    return bottleneck(replace(g, tensors=g.tensors | {"down": whole("down"), "up": whole("up")}), False)


def kronecker_branch(g: Given) -> Rule:
    """y + s (A ⊗ B) x."""
    blocks = torch.cat([torch.cat([a * g["B"] for a in row], 1) for row in g["A"]])
    return lambda x, y: (y.double() + g.options["scale"] * x.double() @ blocks.T).to(y.dtype)


HIDDEN: dict[str, Callable[[Given], Rule]] = {
    "houlsby": lambda g: bottleneck(g, False),
    "llmseries": lambda g: bottleneck(g, False),
    "llmparallel": lambda g: bottleneck(g, True),
    "adaptformer": lambda g: bottleneck(g, True),
    "compacter": compacter,
    "pfeiffer": lambda g: bottleneck(g, False),
    "linadapter": lambda g: bottleneck(g, False, normed=True),
    "paralleladapter": lambda g: bottleneck(g, True),
    "kronab": kronecker_branch,
}  # fmt: skip
ELSEWHERE = {
    "loreft": "tests/hidden/test_reft.py", "direft": "tests/hidden/test_reft.py",
    "noreft": "tests/hidden/test_reft.py", "consreft": "tests/hidden/test_reft.py",
    "lobireft": "tests/hidden/test_reft.py",
    "prompttuning": "tests/tokens/test_prompt.py", "prefixtuning": "tests/tokens/test_prefix.py",
    "linearprobe": "has no equation but the head's", "bitfit": "copies", "full": "copies",
    "normtuning": "copies", "galore": "copies; its optimizer: tests/papers/test_galore.py",
    "ist": "tests/papers/test_ist.py", "tfew": "tests/papers/test_tfew.py",
    "sidetuning": "tests/papers/test_side.py", "unipt": "tests/papers/test_side.py",
    "nearestneighbours": "tests/papers/test_fitted.py", "stateoffset": "tests/papers/test_statespace.py",
}  # fmt: skip
"""Where the other methods' equations are checked."""
