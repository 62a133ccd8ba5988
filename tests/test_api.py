"Everything that the library exports is explained and used."
import dataclasses, inspect, json, re
from importlib import import_module
from pathlib import Path
import pytest
from PIL import Image
from fastcore.docments import docments
from attn_diversity.data import VALID_NAMES, folder_dls

root = Path(__file__).parent.parent
modules = {f.stem: import_module(f'attn_diversity.{f.stem}') for f in sorted((root/'attn_diversity').glob('[!_]*.py'))}
exported = [(m,n) for m,mod in modules.items() for n in mod.__all__]
source = lambda c: ''.join(c['source'])
notebooks = [f for f in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts]
cells = [source(c) for f in notebooks for c in json.loads(f.read_text(encoding='utf-8'))['cells']
         if c['cell_type']=='code']
tests = [f.read_text(encoding='utf-8') for f in (root/'tests').glob('*.py')]

def defines(code, name): return re.search(rf'^(def|class) {name}\b|^{name}\s*=|^{name},', code, flags=re.M) is not None
def uses(code, name):
    code = re.sub(r'^\s*(from|import) .*$|#.*$', '', code, flags=re.M)
    return re.search(rf'\b{name}\b', code) is not None
def own(o): # what has the parameters: a function, or the __init__ that a class writes itself
    if dataclasses.is_dataclass(o): return None # its fields stand in a class body, each with its comment
    return o if inspect.isfunction(o) else vars(o).get('__init__') if inspect.isclass(o) else None

def shape(s): return re.search(r'\[.*\]|\ba number\b', s)

def docstring_gaps(o):
    doc = o.__dict__.get('__doc__') if inspect.isclass(o) else o.__doc__
    if not doc or not doc.strip(): yield 'no docstring'
    elif '\n' in doc.strip(): yield 'a docstring of several lines'

def parameter_gap(p, d, f): # of the parameter p of f, which docments knows as d
    if p.kind==p.VAR_KEYWORD: # docments does not read these
        said = re.search(rf'\*\*{p.name}[^\n]*# ?\S', inspect.getsource(f))
        return None if said else f'nothing said about **{p.name}'
    if not d or not d.docment: return f'nothing said about {p.name}'
    if 'Tensor' in str(p.annotation) and not shape(d.docment):
        return f'{p.name} is a tensor of unknown shape: {d.docment}'

def return_gap(annotation, d):
    if not d or not d.docment: return 'nothing said about what it returns'
    if 'Tensor' in str(annotation) and not shape(d.docment):
        return f'it returns a tensor of unknown shape: {d.docment}'

def gaps(o, name):
    "What is missing in the explanation of a function or class"
    if not inspect.isfunction(o) and not inspect.isclass(o): return
    yield from docstring_gaps(o)
    if not (f := own(o)): return
    f = inspect.unwrap(f)
    said = docments(f, full=True)
    found = [parameter_gap(p, said.get(p.name), f)
             for p in inspect.signature(f).parameters.values() if p.name!='self']
    back = inspect.signature(f).return_annotation
    if inspect.isfunction(o) and back not in (inspect.Signature.empty, None):
        found.append(return_gap(back, said.get('return')))
    yield from filter(None, found)

def test_the_check_finds_gaps():
    from torch import Tensor
    def bad(x:Tensor, # an image
        y=1, **more)->Tensor:
        """Two

        lines"""
    assert len(list(gaps(bad, 'bad')))==5
    def good(
        x:Tensor, # an image [3, H, W]
        *args, # more of them
        y=1, # a number
        **kwargs # for `bad`
    )->Tensor: # its mean []
        "One line"
    assert not list(gaps(good, 'good'))
    assert uses('a = f(1)', 'f') and not uses('from x import f # f', 'f') and defines('def f(', 'f')

def test_every_export_is_explained():
    found = [f'{m}.{n}: {g}' for m,n in exported for g in gaps(getattr(modules[m], n), n)]
    assert len(exported)>70 and not found, '\n'.join(['', *found])

def test_every_export_is_used():
    "In a cell other than the one that defines it, or in a test"
    unused = [f'{m}.{n}' for m,n in exported if not any(uses(c, n) and not defines(c, n) for c in cells+tests)]
    assert not unused, unused

@pytest.mark.parametrize('name', VALID_NAMES)
def test_names_of_the_validation_folder(name, tmp_path):
    for part in ('train',name):
        for kind in ('cat','dog'):
            (tmp_path/part/kind).mkdir(parents=True)
            for i in range(2): Image.new('RGB', (32,32), (i*99,0,0)).save(tmp_path/part/kind/f'{i}.png')
    dls = folder_dls(tmp_path, img_size=16, batch_size=2, n_workers=0)
    assert {f.parent.parent.name for f in dls.valid_ds.items}=={name} and len(dls.valid_ds)==len(dls.train_ds)==4
