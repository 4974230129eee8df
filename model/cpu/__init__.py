"""The native step: the whole network in plain C behind `model.network.Network`.

`src/` holds one small file an operation; `build` compiles them once for the machine at hand,
`library` mirrors their structs, `matrices` packs weights, `network` puts a model together.
"""
