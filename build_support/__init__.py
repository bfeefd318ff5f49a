"""Parts of setup.py that need neither setuptools nor PyTorch. They are not installed."""
