"""Other libraries: callbacks for their trainers, and Torch-Pruning. Each module needs the library of its name."""
