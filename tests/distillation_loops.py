"""DINOv2's step written out of its papers as loops over images, views, patches and prototypes.

float64, one image at a time, nothing of pathfm.methods but the settings' numbers. DINO: arXiv
2104.14294, Algorithm 1. iBOT: arXiv 2111.07832, eq. 2. Sinkhorn-Knopp: SwAV's Listing 1, arXiv
2006.09882. KoLeo: arXiv 1806.03198, eq. 4. KDE: arXiv 2504.05186.
"""

from __future__ import annotations

import math

import torch


def tokens(network, image, hidden=(), mask_token=None):
    """(CLS, [patch tokens]) of one image; the patches `hidden` are replaced before their position."""
    patches = network.patch_embed(image[None])
    rows = [
        mask_token if number in hidden else row
        for number, row in enumerate(patches.reshape(-1, patches.shape[-1]))
    ]
    x = network._pos_embed(torch.stack(rows).view_as(patches))
    for block in network.blocks:
        x = block(x)
    x = network.norm(x)[0]
    return x[0], list(x[network.num_prefix_tokens :])


def project(head, x):
    """Three linear layers with GELU between, length 1, cosines with prototypes times lengths."""
    first, second, third = (m for m in head.layers if isinstance(m, torch.nn.Linear))
    for layer in (first, second):
        x = layer.weight @ x + layer.bias
        x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    x = third.weight @ x + third.bias
    x = x / x.square().sum().sqrt()
    prototypes = head.last_layer
    return [
        g * (v @ x) / v.square().sum().sqrt()
        for g, v in zip(prototypes.weight_g[:, 0], prototypes.weight_v, strict=True)
    ]


def softmax(logits, centre, temperature):
    powers = [math.exp((a - c) / temperature) for a, c in zip(logits, centre, strict=True)]
    return [p / sum(powers) for p in powers]


def sinkhorn(rows, temperature, iterations):
    """SwAV: Q^T = exp(scores / T) over its sum; prototypes to 1 / K, samples to 1 / B; Q * B."""
    n, k = len(rows), len(rows[0])
    q = [[math.exp(a / temperature) for a in row] for row in rows]
    total = sum(map(sum, q))
    q = [[a / total for a in row] for row in q]
    for _ in range(iterations):
        columns = [sum(row[j] for row in q) for j in range(k)]
        q = [[row[j] / columns[j] / k for j in range(k)] for row in q]
        q = [[a / sum(row) / n for a in row] for row in q]
    return [[a * n for a in row] for row in q]


def cross_entropy(p, logits, temperature):
    scaled = torch.stack(list(logits)) / temperature
    log_sum = scaled.exp().sum().log()
    return -sum(a * (s - log_sum) for a, s in zip(p, scaled, strict=True))


def koleo(rows):
    rows = [row / row.square().sum().sqrt() for row in rows]
    total = 0.0
    for i, row in enumerate(rows):
        near = min(
            (j for j in range(len(rows)) if j != i),
            key=lambda j: float((row - rows[j]).detach().square().sum()),
        )
        total -= ((row - rows[near]).square().sum().sqrt() + 1e-8).log()
    return total / len(rows)


def kde(rows, kappa):
    rows = [row / row.square().sum().sqrt() for row in rows]
    total = rows[0].new_zeros(())
    for i, row in enumerate(rows):
        others = [torch.exp(kappa * (row @ o - 1)) for j, o in enumerate(rows) if j != i]
        total = total + torch.stack(others).mean().log()
    return total / len(rows)


def dinov2_step(student, teacher, views, n_global, hidden, settings, temperature, centres):
    """{"loss", "dino", "ibot", "regulariser"} of one step, differentiable in the student.

    student, teacher: {"backbone", "head"[, "ibot_head"]} in float64. views[v][i]: an image.
    hidden[v][i]: the numbers of its masked patches. centres: (CLS, patches), lists of K numbers.
    """
    n = len(views[0])
    both = {
        name: net["ibot_head" if "ibot_head" in net else "head"]
        for name, net in (("student", student), ("teacher", teacher))
    }
    t_cls, t_patches = {}, {}
    for v in range(n_global):
        for i in range(n):
            with torch.no_grad():
                cls, patches = tokens(teacher["backbone"].network, views[v][i])
                t_cls[v, i] = [float(a) for a in project(teacher["head"], cls)]
                for patch in hidden[v][i]:
                    logits = project(both["teacher"], patches[patch])
                    t_patches[v, i, patch] = [float(a) for a in logits]
    if settings.centring == "sinkhorn":
        rounds = settings.sinkhorn_iterations
        p_cls = dict(zip(t_cls, sinkhorn(list(t_cls.values()), temperature, rounds), strict=True))
        rows = sinkhorn(list(t_patches.values()), temperature, rounds)
        p_patches = dict(zip(t_patches, rows, strict=True))
    else:
        p_cls = {key: softmax(row, centres[0], temperature) for key, row in t_cls.items()}
        p_patches = {key: softmax(row, centres[1], temperature) for key, row in t_patches.items()}

    s_cls, s_out, ibot = {}, {}, 0.0
    backbone = student["backbone"]
    for v in range(len(views)):
        for i in range(n):
            masked = hidden[v][i] if v < n_global else ()
            cls, patches = tokens(backbone.network, views[v][i], masked, backbone.mask_token)
            s_cls[v, i], s_out[v, i] = cls, project(student["head"], cls)
            for patch in masked:
                out = project(both["student"], patches[patch])
                each = cross_entropy(p_patches[v, i, patch], out, settings.student_temp)
                ibot = ibot + each / len(masked) / (n_global * n)
    dino, pairs = 0.0, 0
    for t in range(n_global):
        for s in range(len(views)):
            if s == t:
                continue
            pairs += 1
            for i in range(n):
                dino = dino + cross_entropy(p_cls[t, i], s_out[s, i], settings.student_temp) / n
    dino = dino / pairs
    spread = 0.0
    for v in range(n_global):
        rows = [s_cls[v, i] for i in range(n)]
        of = (
            koleo(rows)
            if settings.regulariser == "koleo"
            else kde(rows, settings.kde_concentration)
        )
        spread = spread + of
    loss = (
        settings.dino_weight * dino
        + settings.ibot_weight * ibot
        + settings.regulariser_weight * spread
    )
    return {
        "loss": loss,
        "dino_loss": dino,
        "ibot_loss": ibot,
        "regulariser": spread,
        "t_cls": list(t_cls.values()),
        "t_patches": list(t_patches.values()),
    }
