"""`python -m benchmarks`: the list of benchmarks. `python -m benchmarks NAME [options]`: run one."""

from benchmarks.common import main

if __name__ == "__main__": main()
