"""How much each format of each layer is expected to hurt."""
