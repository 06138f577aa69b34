"""one_parser.py NAME [libFuzzer's options] CORPUS SEEDS: a parser under atheris, guided by its own code's coverage."""

import sys

import atheris

with atheris.instrument_imports(include=["fastrot", "tarfile", "yaml", "json", "numpy.lib"]):
    import parsers

name = sys.argv.pop(1)
atheris.Setup(sys.argv, parsers.PARSERS[name].one)
atheris.Fuzz()
