import sys

from echosvr.cli import main

sys.exit(main())
