"""LoRA where PEFT stops: fused qkv, stochastic partial update, a cheaper step."""
