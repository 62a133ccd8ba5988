"""The gauge that code has to pass: ruff's rules in ruff.toml, no private name of another module, no circle of imports.
For code cells of notebooks, the package, tests/ and .ci/. Prints each finding, and exits with 1 if there is one."""
import ast, json, subprocess, sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from IPython.core.inputtransformer2 import TransformerManager

root = Path(__file__).resolve().parent.parent
folders = ('nbs','tests','.ci','attn_diversity')

def of_ruff():
    "What ruff finds, in notebooks too"
    r = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format', 'json', *folders],
                       cwd=root, capture_output=True, text=True)
    if r.returncode not in (0,1) or not r.stdout: raise SystemExit(r.stderr)
    for f in json.loads(r.stdout):
        cell = f"cell {f['cell']}, " if f['cell'] else ''
        where = f"{Path(f['filename']).relative_to(root)}:{cell}line {f['location']['row']}"
        yield f"{where}: {f['code'] or ''} {f['message']}"

def sources():
    "(where, code) of every file and every code cell; magics become calls, as in IPython"
    magic = TransformerManager().transform_cell
    for f in sorted(f for folder in folders for f in (root/folder).rglob('*') if f.suffix in ('.py','.ipynb')):
        where,text = f'{f.relative_to(root)}:',f.read_text(encoding='utf-8')
        if '.ipynb_checkpoints' in f.parts: continue
        if f.suffix=='.py':
            yield where, text
            continue
        for i,c in enumerate(json.loads(text)['cells'], start=1): # counted as ruff does
            if c['cell_type']=='code': yield f'{where}cell {i}, ', magic(''.join(c['source']))

def imports(code):
    "(line, module of the package, name or '') of every import from the package, wherever it stands"
    for n in ast.walk(ast.parse(code)):
        if isinstance(n, ast.Import): found = [(a.name, '') for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            module = '.'.join(filter(None, ['attn_diversity' if n.level else '', n.module]))
            found = [(module, a.name) for a in n.names]
            if module=='attn_diversity': found = [(f'{module}.{name}', '') for _,name in found]
        else: continue
        for module,name in found:
            if module.startswith('attn_diversity.'): yield n.lineno, module.split('.')[1], name

def of_names():
    "Names with an underscore that one module takes from another"
    for where,code in sources():
        for line,module,name in imports(code):
            if name.startswith('_') and not name.startswith('__'):
                yield f'{where}line {line}: {name} is private to {module}'

def of_circles():
    "Modules that import each other, at the top or within a function"
    used = {f.stem: {module for _,module,_ in imports(f.read_text(encoding='utf-8'))}
            for f in (root/'attn_diversity').glob('[!_]*.py')}
    try: TopologicalSorter(used).prepare()
    except CycleError as e: yield f"attn_diversity: a circle of imports, {' <- '.join(e.args[1])}"

if __name__=='__main__':
    found = [*of_ruff(), *of_names(), *of_circles()]
    print(*(found or ['The gauge finds nothing.']), sep='\n')
    sys.exit(bool(found))
