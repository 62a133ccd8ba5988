"What the project promises about its own files."
import ast, json, os, re, subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path
import nbformat, pytest, yaml
from filelock import FileLock
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

root = Path(__file__).parent.parent
notebooks = sorted(f for f in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts)
cells = {f: json.loads(f.read_text(encoding='utf-8'))['cells'] for f in notebooks}
settings = ConfigParser(delimiters=['='])
settings.read(root/'settings.ini')
settings = settings['DEFAULT']
source = lambda c: ''.join(c['source'])

requirements = {part: [Requirement(r) for r in settings[part].split()]
                for part in ('requirements','dev_requirements','hf_requirements','onnx_requirements')}

def pins(file):
    "The versions that a file pins for each Python: {Python: {name: version}}"
    found = {f'3.{n}': {} for n in (10,11,12,13)}
    for line in (root/file).read_text().splitlines():
        if '==' not in line: continue
        r = Requirement(line.strip(' \\'))
        for python,versions in found.items():
            here = dict(python_version=python, python_full_version=python+'.0', sys_platform='linux',
                        platform_machine='x86_64', platform_system='Linux', platform_python_implementation='CPython')
            if r.marker is None or r.marker.evaluate(here):
                assert canonicalize_name(r.name) not in versions, f'{file}: {r.name} twice for Python {python}'
                versions[canonicalize_name(r.name)] = str(r.specifier).removeprefix('==')
    return found

def test_users_do_not_install_nbdev():
    names = [r.name for r in requirements['requirements']]
    assert 'nbdev' not in names and 'torch' in names
    assert 'import pkg_resources' not in (root/'setup.py').read_text()

def test_what_modules_import_is_required():
    "All that the package imports: at a module's top from the requirements, in a function also from an extra"
    modules = {'scikit-learn': 'sklearn', 'pillow': 'PIL'} # where the names differ
    def names(*parts): return {modules.get(r.name, r.name.replace('-','_')) for p in parts for r in requirements[p]}
    always = names('requirements') | {'attn_diversity'} | sys.stdlib_module_names
    always |= {'numpy'} # comes with torch's friends
    asked_for = always | names('hf_requirements','onnx_requirements')
    for f in (root/'attn_diversity').glob('*.py'):
        tree = ast.parse(f.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import): found = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level: found = [node.module]
            else: found = []
            for m in found:
                allowed = always if node in tree.body else asked_for
                assert m.split('.')[0] in allowed, f'{f.name} imports {m}'

def test_arrows_point_up():
    "A module imports only modules of notebooks above its own"
    order = [m.group(1) for f in notebooks for c in cells[f] if (m := re.match(r'#\| default_exp (\w+)', source(c)))]
    used = {}
    for i,name in enumerate(order):
        module = ast.parse((root/'attn_diversity'/f'{name}.py').read_text())
        used[name] = {n.module.split('.')[-1] for n in module.body if isinstance(n, ast.ImportFrom) and n.module
                      and (n.level or n.module.startswith('attn_diversity.'))}
        assert used[name]<=set(order[:i]), f'{name} imports {used[name]-set(order[:i])}'
    assert 'attention' in used['pruning'] # the pattern finds imports at all

def test_settings_constraints_and_lock_agree():
    "What settings.ini asks for is pinned in constraints.txt, in its range, and all of that stands in requirements.lock"
    pinned,locked = pins('constraints.txt'),pins('requirements.lock')
    for python,versions in pinned.items():
        lock = locked[python]
        for r in sum(requirements.values(), []):
            name = canonicalize_name(r.name)
            if r.marker and not r.marker.evaluate(dict(python_version=python)): continue
            assert name in versions, f'{name} is not pinned for Python {python}'
            assert r.specifier.contains(versions[name]), f'{name}=={versions[name]}, and settings.ini wants {r}'
        off = {n: (v, lock.get(n)) for n,v in versions.items() if lock.get(n)!=v}
        assert not off, f'run make lock: constraints.txt and requirements.lock differ for Python {python}: {off}'
        assert len(lock)>150

def test_every_file_of_the_lock_has_a_hash():
    lock = re.sub(r'^#.*\n', '', (root/'requirements.lock').read_text(), flags=re.M)
    for entry in re.split(r'\n(?=\S)', lock.strip()):
        assert re.search('==.*--hash=sha256:[0-9a-f]{64}', entry, flags=re.S), entry
    assert not re.search('https?://|file:', lock) # from PyPI, or a mirror of the reader's own

def test_actions_are_named_by_a_hash():
    "A tag can be moved to other code; the version stands beside"
    used = [line for f in (root/'.github'/'workflows').glob('*.yaml') for line in f.read_text().splitlines()
            if 'uses:' in line]
    assert len(used)>5
    for line in used: assert re.search(r'uses: [\w/.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$', line), line

@pytest.mark.parametrize('text,free', [
    ('MIT',True), ('Apache-2.0 WITH LLVM-exception',True), ('BSD License; MIT License',True), ('MIT OR GPL-3.0',True),
    ('(MIT OR GPL-3.0) AND Zlib',True), ('MIT AND CC-BY-NC-4.0',False), ('CC-BY-NC-4.0',False), ('UNKNOWN',False),
    ('Other/Proprietary License',False), ('Free for non-commercial use',False), ('',False)])
def test_licences_that_are_free(text, free):
    sys.path.insert(0, str(root/'.ci'))
    from licences import is_free
    assert is_free(text)==free

def test_licences_are_listed():
    "Of all that is installed here; the command fails if one is not free"
    r = subprocess.run([sys.executable, root/'.ci'/'licences.py'], capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    users,developers = r.stdout.split('What only developers install')
    assert '\n  torch ' in users and '\n  nbdev ' in developers and ': MIT' in users

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
        unseen = re.search(r'^#\|\s*(hide|export|exporti|echo:\s*false)\s*$', source(c), flags=re.M)
        wide = [l for l in source(c).splitlines() if len(l)>(120 if unseen else 95)]
        assert not wide, f'too wide for a page: {wide}'
        # nbdev takes the first word of a line for an order to itself
        orders = r'^#\|   (hide|hide_line|exec_doc|exports?|exporti|eval|echo|slow|cuda|notest|default_exp)\b'
        assert not re.search(orders, source(c), flags=re.M)

def test_a_failing_notebook_names_its_cell(tmp_path):
    "Of three one has a fault, and one ends its process"
    codes = dict(good='1+1', bad='def f(): return 1/0', killed='import os\nos.kill(os.getpid(), 9)')
    for name,code in codes.items():
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in ('a = 1', code, 'f()')])
        if name=='good': nb.cells.pop()
        nbformat.write(nb, tmp_path/f'{name}.ipynb')
    r = subprocess.run([sys.executable, root/'.ci'/'notebooks.py', *tmp_path.glob('*.ipynb')],
                       capture_output=True, text=True)
    assert r.returncode==1 and re.search('passed.*good.ipynb', r.stdout), r.stdout+r.stderr
    named = r'ZeroDivisionError in .*bad\.ipynb.*While Executing Cell #3:.*in f\n'
    assert re.search(named, r.stderr, flags=re.S), r.stderr
    assert 'Failed, 2: ' in r.stderr and 'killed.ipynb ended with -9' in r.stderr

def test_readme_is_the_index():
    sys.path.insert(0, str(root/'.ci'))
    from readme import readme
    cwd = os.getcwd()
    try:
        os.chdir(root)
        with FileLock('_proc.lock'): text,pictures = readme() # the site is made there, too (test_site.py)
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
