"""What the tests share: structures, potentials, gradients and their finite differences, training runs, the command
line, and files as electronic-structure codes write them."""
