"""tokenenv.envs."""

if __name__ != "tokenenv.envs":
    raise ImportError(
        "import tokenenv.envs; the repository root is on sys.path and hides the installed package"
    )
