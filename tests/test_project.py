"What the project promises about its own files."
import ast, json, os, re, subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest, yaml

root = Path(__file__).parent.parent
notebooks = sorted(f for f in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts)
cells = {f: json.loads(f.read_text(encoding='utf-8'))['cells'] for f in notebooks}
settings = ConfigParser(delimiters=['='])
settings.read(root/'settings.ini')
settings = settings['DEFAULT']
source = lambda c: ''.join(c['source'])

def test_users_do_not_install_nbdev():
    names = [re.split('[<>=]', r)[0] for r in settings['requirements'].split()]
    assert 'nbdev' not in names and 'torch' in names
    assert 'import pkg_resources' not in (root/'setup.py').read_text()

def test_what_modules_import_is_required():
    "Every third-party module that the package imports is in the requirements"
    modules = {'scikit-learn': 'sklearn', 'pillow': 'PIL'} # where the names differ
    required = [re.split('[<>=]', r)[0] for r in settings['requirements'].split()]
    names = {modules.get(n, n.replace('-','_')) for n in required}
    names |= {'numpy','attn_diversity'} # numpy comes with torch's friends
    for f in (root/'attn_diversity').glob('*.py'):
        for node in ast.walk(ast.parse(f.read_text())):
            if isinstance(node, ast.Import): found = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level: found = [node.module]
            else: found = []
            for m in found:
                top = m.split('.')[0]
                assert top in names or top in sys.stdlib_module_names, f'{f.name} imports {m}'

def test_arrows_point_up():
    "A module imports only modules of notebooks above its own"
    order = [m.group(1) for f in notebooks for c in cells[f] if (m := re.match(r'#\| default_exp (\w+)', source(c)))]
    used = {}
    for i,name in enumerate(order):
        module = (root/'attn_diversity'/f'{name}.py').read_text()
        used[name] = set(re.findall(r'^from (?:attn_diversity)?\.(\w+)', module, flags=re.M))
        assert used[name]<=set(order[:i]), f'{name} imports {used[name]-set(order[:i])}'
    assert 'attention' in used['pruning'] # the pattern finds imports at all

def test_constraints_pin_what_developers_install():
    plain = lambda name: name.lower().replace('_','-')
    lines = (root/'constraints.txt').read_text().splitlines()
    pinned = {plain(l.split('==')[0]) for l in lines if '==' in l}
    required = (settings['requirements']+' '+settings['dev_requirements']).split()
    wanted = {plain(re.split('[<>=;]', r)[0]) for r in required}
    assert wanted<=pinned, wanted-pinned

def test_quarto_stub_finds_its_targets():
    stub = yaml.safe_load((root/'nbs'/'_quarto.yml').read_text())
    assert (root/'nbs'/stub['metadata-files'][0]).resolve()==root/'_quarto.yml'
    def files(node):
        if isinstance(node, str): return [node]
        return sum((files(n) for n in (node.get('contents', []) if isinstance(node, dict) else node)), [])
    shown = files(yaml.safe_load((root/'_quarto.yml').read_text())['website']['sidebar']['contents'])
    assert {root/'nbs'/f for f in shown}=={*notebooks, *(root/'nbs').rglob('*.qmd')}

@pytest.mark.parametrize('nb', notebooks, ids=lambda f: f.stem)
def test_notebook_is_fit_to_read(nb):
    assert re.match(r'# .+\n\n> .+', source(cells[nb][0])), 'title and one line'
    assert nb.stat().st_size<1_500_000
    code = [c for c in cells[nb] if c['cell_type']=='code']
    assert any(c['outputs'] for c in code), 'committed without outputs'
    for c in code:
        for o in c['outputs']:
            assert o['output_type']!='error'
            data = {k:v for k,v in o.get('data', {}).items() if not k.startswith('image')}
            text = json.dumps({**o, 'data': data})
            assert not re.search(r'/(work|root|home|tmp)/|site-packages', text), f'a path of some machine: {text[:300]}'
        assert not re.search(r'/(work|root|home|tmp)/', source(c))

def test_readme_is_the_index():
    sys.path.insert(0, str(root/'.ci'))
    from readme import readme
    cwd = os.getcwd()
    try:
        os.chdir(root)
        text,pictures = readme()
    finally: os.chdir(cwd)
    assert (root/'README.md').read_text(encoding='utf-8')==text, 'run make readme'
    for name,data in pictures.items(): assert (root/name).read_bytes()==data

def test_wheel_holds_the_package(tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', tmp_path, root], check=True)
    wheel = zipfile.ZipFile(next(tmp_path.glob('*.whl')))
    names = wheel.namelist()
    for f in (root/'attn_diversity').glob('*.py'): assert f'attn_diversity/{f.name}' in names
    assert not [n for n in names if n.startswith(('nbs/','tests/'))]
    meta = wheel.read(next(n for n in names if n.endswith('METADATA'))).decode()
    assert not re.search(r'^Requires-Dist: nbdev(?!.*extra)', meta, flags=re.M)
