"""Triton kernels of l0kernels. The folder installs as l0kernels.triton_kernels; it imports nothing heavy."""

if __name__ != "l0kernels.triton_kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}, a name that belongs to the Triton project; "
        "install l0kernels (pip install -e .) and `import l0kernels.triton_kernels`"
    )
