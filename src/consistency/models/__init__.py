"""Networks: layers, one UNet, the preconditioned denoiser around it, and averages of weights. torch.nn only."""
