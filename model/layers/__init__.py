"""The pieces a Llama block is made of, each a plain function or a small class over tensors."""
