"What all test files share"
import gc, io, os, shutil, tempfile
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
import pytest

# a file is one worker's, so those that take longest come first (Makefile: --no-loadscope-reorder)
longest = ('test_site','test_export','test_training','test_commands','test_families','test_mechanism','test_evidence',
           'test_explorer','test_properties','test_habits')

def pytest_configure(config): config.addinivalue_line('markers', 'slow: takes minutes, run by `make test-slow`')

def pytest_collection_modifyitems(items):
    items.sort(key=lambda i: longest.index(i.path.stem) if i.path.stem in longest else len(longest))

def pytest_collection_finish():
    gc.collect()
    gc.freeze() # what is imported is not searched for garbage again and again

@pytest.fixture(scope='session', autouse=True)
def nothing_left_behind(tmp_path_factory):
    "What is not in pytest's folder but in the machine's for temporary files is removed: logs of torchrun, kernels"
    tmp_path_factory.getbasetemp()
    os.environ['TMPDIR'] = tempfile.tempdir = tempfile.mkdtemp()
    yield
    shutil.rmtree(tempfile.tempdir, ignore_errors=True)

def say(*args):
    "A command in this process, which saves the seconds of another's imports"
    from attn_diversity.__main__ import main
    out,err,code = io.StringIO(),io.StringIO(),0
    with redirect_stdout(out), redirect_stderr(err):
        try: main([str(a) for a in args])
        except SystemExit as e: code = e.code
    said = f'{code}\n' if isinstance(code, str) else ''
    return SimpleNamespace(returncode=1 if said else code, stdout=out.getvalue(), stderr=err.getvalue()+said)
