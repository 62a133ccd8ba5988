"The site as a reader sees it: every page in Chromium, wide and narrow."
import functools, http.server, re, subprocess, sys, threading
from configparser import ConfigParser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urldefrag, urlsplit
import pytest, yaml
from test_explorer import Page, chromium, wait, websocket

root = Path(__file__).parent.parent
docs,phone = root/'_docs',390
needed = (('Chromium', chromium), ('websocket-client', websocket), ('smalldocs', find_spec('smalldocs')),
          ('latex2mathml', find_spec('latex2mathml')))
missing = [n for n,there in needed if not there]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"SKIPPED, the site was not built and looked at: no {', '.join(missing)}")

look = """(() => {
  const box = e => e.getBoundingClientRect(), main = document.querySelector('main') || document.body
  const all = s => [...document.querySelectorAll(s)], prose = main.cloneNode(true)
  prose.querySelectorAll('code, pre, math, script, style').forEach(e => e.remove())
  return {
    links: [...document.querySelectorAll('a[href]')].map(a => [a.getAttribute('href'), a.href]),
    ids: [...document.querySelectorAll('[id]')].map(e => e.id),
    pictures: [...document.querySelectorAll('main img')].map(i => [i.naturalWidth, box(i).width]),
    elsewhere: all('script[src], link[rel=stylesheet], img[src], iframe[src]').map(e => e.src || e.href)
      .filter(u => !u.startsWith('data:') && !u.startsWith(location.origin)),
    prose: prose.textContent, code: [...main.querySelectorAll('pre')].map(p => p.textContent),
    title: all('h1').map(h => h.textContent),
    below: document.querySelector('.subtitle, .description')?.textContent || '',
    side: [...document.querySelectorAll('#quarto-sidebar a.sidebar-link[href]')].map(a => a.href),
    card: [...document.querySelectorAll('meta[property="og:image"], meta[name="twitter:image"]')].map(m => m.content),
  }})()"""
narrow = """(() => { // what sticks out and cannot be scrolled to, even if the page cuts it off
  const scrolls = p => ['auto','scroll'].includes(getComputedStyle(p).overflowX)
  const held = e => { for (let p = e.parentElement; p; p = p.parentElement) if (scrolls(p)) return true }
  const out = [...document.querySelectorAll('main *')]
    .filter(e => e.getBoundingClientRect().right>innerWidth+2 && !held(e))
  return [document.documentElement.scrollWidth, innerWidth,
          out.map(e => `${e.tagName} ${e.className} ${e.textContent.slice(0,50)}`)]
})()"""

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

class Site:
    "The built site, served, with one browser"
    def __init__(self, folder):
        r = subprocess.run([sys.executable, root/'.ci'/'docs.py', 'smalldocs'], capture_output=True, text=True)
        assert r.returncode==0, r.stderr
        self.warnings = [l for l in r.stderr.splitlines() if l.startswith('warning:')]
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=docs))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url,self.pages = f'http://127.0.0.1:{self.server.server_port}/',{}
        try:
            self.page = Page('about:blank', folder)
            for f in sorted(docs.rglob('*.html')):
                name = f.relative_to(docs).as_posix()
                self.open(name)
                self.pages[name] = self.page.js(look)
                self.size(phone)
                self.pages[name]['narrow'] = self.page.js(narrow)
                self.size(1200)
        except BaseException:
            self.server.shutdown()
            raise
    def size(self, w):
        self.page('Emulation.setDeviceMetricsOverride', width=w, height=900, deviceScaleFactor=1, mobile=w<600)
    def open(self, name):
        self.page('Page.navigate', url=self.url+name)
        there = f"location.href=={self.url+name!r} && document.readyState=='complete'"
        wait(lambda: self.page.js(there), f'{name} opens')
    def close(self):
        self.page.close()
        self.server.shutdown()

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    s = Site(tmp_path_factory.mktemp('chromium'))
    yield s
    s.close()

home = ConfigParser(delimiters=['='])
home.read(root/'settings.ini')
home = home['DEFAULT']['doc_host']+home['DEFAULT']['doc_baseurl']+'/'
config = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))
def sources(node):
    if isinstance(node, str): return [node]
    return sum((sources(n) for n in (node.get('contents', []) if isinstance(node, dict) else node)), [])
shown = sources(config['website']['sidebar']['contents'])
def page_of(source): # nbdev leaves the number out
    return re.sub(r'(^|/)\d+[a-z]?_', r'\1', source).rsplit('.', 1)[0]+'.html'

def test_every_notebook_has_a_page(site):
    assert not site.warnings
    assert set(site.pages)=={page_of(s) for s in shown}
    for name,p in site.pages.items():
        assert len(p['title'])==1 and p['title'][0].strip(), (name, p['title'])
        assert p['below'].strip() and len(p['prose'])>300, (name, p['below'])

def test_links_and_anchors(site):
    inside = 0
    for name,p in site.pages.items():
        for raw,full in p['links']:
            target,anchor = urldefrag(full)
            if target.startswith(site.url):
                inside += 1
                page = target.removeprefix(site.url) or 'index.html'
                assert page in site.pages or (docs/page).is_file(), f'{name}: {raw} leads nowhere'
                if anchor and page in site.pages:
                    assert anchor in site.pages[page]['ids'], f'{name}: {raw}: {page} has no such place'
            else:
                u = urlsplit(full)
                assert u.scheme=='https' and re.fullmatch(r'[\w-]+(\.[\w-]+)+', u.netloc), f'{name}: {raw}'
                assert not re.search(r'localhost|127\.0\.0\.1', full), f'{name}: {raw}'
                m = re.match(r'https://github.com/attn-diversity/attn_diversity/blob/main/([^#]+)', full)
                assert not m or (root/m[1]).is_file(), f'{name}: {raw}: no such file in the repository'
    assert inside>25*len(site.pages)

def test_pictures(site):
    assert sum(len(p['pictures']) for p in site.pages.values())>30 and site.pages['index.html']['pictures']
    for name,p in site.pages.items():
        for there,wide in p['pictures']: assert there>0 and wide>0, f'{name} has a picture that is not there'
        assert len(p['card'])==2
        for c in p['card']: assert (docs/c.removeprefix(home)).is_file(), f'{name}: {c}'

def test_readable_without_a_network(site):
    for name,p in site.pages.items(): assert not p['elsewhere'], name

def test_side_bar_shows_the_course_in_order(site):
    course = [page_of(s) for s in shown]
    for name,p in site.pages.items(): assert [u.removeprefix(site.url) for u in p['side']]==course, name

def test_nothing_raw_in_the_text(site):
    for name,p in site.pages.items():
        for what in (r'#\|', r'@(fig|tbl|eq|sec)-', r'\\[(\[]', r'\$\$', r'\{\{<', r'^:::', r'\]\(', r'\*\*', '`'):
            found = re.search(f'.{{0,40}}{what}.{{0,40}}', p['prose'], flags=re.M)
            assert not found, f'{name}: {found[0]}'
        for c in p['code']: assert not re.search(r'^\s*#\|', c, flags=re.M), f'{name}: {c[:200]}'
        for c in p['code']: assert not re.search(r'\]\(https://', c), f'{name}: {c[:200]}'

def test_the_library_is_documented(site):
    "What a module exports has its signature on the module's page"
    n = 0
    for f in sorted((root/'attn_diversity').glob('[!_]*.py')):
        module = import_module(f'attn_diversity.{f.stem}')
        for name in module.__all__:
            if not callable(getattr(module, name)): continue
            home = getattr(module, name).__module__.split('.') # a name may be passed on by another module
            p = site.pages[f"{home[1] if home[0]=='attn_diversity' else f.stem}.html"]
            n += 1
            assert name.lower() in p['ids'], f'{f.stem}.html has nothing about {name}'
            assert any(re.match(rf'(class|def) {name}\(', c.strip()) for c in p['code']), f'no signature of {name}'
    assert n>60

def test_fits_on_a_phone(site):
    for name,p in site.pages.items():
        page,window,wide = p['narrow']
        assert window==phone and page<=window+2 and not wide, f'{name} is {page} wide: {wide[:5]}'

def test_search_finds(site):
    site.open('tutorials/compare.html') # one folder down, where wrong paths show
    wait(lambda: site.page.box('#quarto-search input'), 'there is a search box')
    site.page.js("(() => { const i = document.querySelector('#quarto-search input'); i.focus(); "
                 "i.value = 'MedAD'; i.dispatchEvent(new Event('input', {bubbles: true})) })()")
    results = ("[...document.querySelectorAll('.smalldocs-search-results a')]"
               ".map(a => [a.href, a.innerText])")
    found = wait(lambda: site.page.js(results), 'the search finds something')
    pages = {urldefrag(u)[0].removeprefix(site.url) for u,_ in found}
    assert pages<=set(site.pages) and 'indicators.html' in pages and any('medad' in t.lower() for _,t in found), found

def test_light_and_dark(site):
    site.open('index.html')
    def background():
        colour = site.page.js("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r'\d+', colour)[:3]))
    for scheme in ('light','dark'):
        site.page('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])
        wait(lambda: (background()<200)==(scheme=='dark'), f'{scheme}: the page follows')
    site.page.click('.quarto-color-scheme-toggle') # and by hand
    wait(lambda: background()>600, 'light after a click')
    site.page('Emulation.setEmulatedMedia', features=[])

def test_workflows_and_templates():
    targets = set(re.findall(r'^([a-z-]+):', (root/'Makefile').read_text(), flags=re.M))
    flows = {f.stem: yaml.safe_load(f.read_text(encoding='utf-8')) for f in (root/'.github'/'workflows').glob('*.yaml')}
    assert set(flows)=={'test','deploy'}
    runs = {n: [s for j in w['jobs'].values() for s in j['steps']] for n,w in flows.items()}
    for n,steps in runs.items():
        said = '\n'.join(s.get('run', '') for s in steps)
        made = re.findall(r'\bmake ((?:[a-z-]+ ?)+)', said)
        assert made and {t for m in made for t in m.split()}<=targets, (n, made)
        for script in re.findall(r'\.ci/\w+', said): assert (root/script).exists()
    versions = flows['test']['jobs']['test']['strategy']['matrix']['python-version']
    assert versions==['3.10','3.11','3.12','3.13']
    assert any('quarto' in s.get('uses', '') for s in runs['deploy'])
    for f in (root/'.github'/'ISSUE_TEMPLATE').glob('*.yml'): yaml.safe_load(f.read_text(encoding='utf-8'))
    cite = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    assert cite['cff-version'] and cite['title'] and cite['authors']
