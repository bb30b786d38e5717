"""Muon and AdamW, each for the weights that it suits."""
import torch

WEIGHT_DECAY = 0.05  # of the matrices of the layers


def optimizers_of(model, lr):
    """[Muon, AdamW]: Muon for the matrices of the layers, AdamW for embeddings and gains.

    Muon turns the momentum of a matrix into the nearest orthogonal one (Jordan et al. 2024). It is
    scaled to the size of an AdamW step (arXiv 2502.16982), so that one rate serves both."""
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr, WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.0)]
