"""The techniques, one file each, installed as ``fxcompress.passes``."""

if __name__ != "fxcompress.passes":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import it as 'fxcompress.passes', "
        "or every pass class exists twice and registered names no longer match"
    )
