# Two commands for a fresh clone; each makes its own environment in .venv and says first what it will cost.
PYTHON ?= python3

.PHONY: chat test check wheel help

help:
	@echo "make chat   set up and start a chat (ARGS=\"FILE --temp 0.6\" for your own file and options)"
	@echo "make test   set up and run all tests (ARGS=\"-k codec\" passes options to pytest)"
	@echo "make wheel  build a wheel for other machines, and try it (PYTHONS=\"3.10 3.12\" builds one for each)"
	@echo "make check  formatting, types and the patch series only"

chat:
	@$(PYTHON) tools/dev.py chat $(ARGS)

test:
	@$(PYTHON) tools/dev.py test $(ARGS)

check:
	@$(PYTHON) tools/dev.py check

wheel:
	@$(PYTHON) tools/dev.py wheel $(PYTHONS) $(ARGS)
