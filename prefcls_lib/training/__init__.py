"""The training loop.

Open `loop` first: `fit`. It takes `step`s at the rates of `optim`, calls `validation`, saves its state in a
`checkpoint`, and shares its work with other processes through `distributed`.
"""
