"The site as a reader sees it: every page in Chromium, wide and narrow."
import functools, http.server, json, re, subprocess, sys, threading, timm
from configparser import ConfigParser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urldefrag, urlsplit
import pytest, yaml
from filelock import FileLock
from attn_diversity.methods import reduce_vit, twin_of
from attn_diversity.reduce import reducers_of, token_counts
from PIL import Image
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
    told: all('main img').map(i => i.alt),
    silent: all('main img').filter(i => !i.alt.trim() && !i.closest('button')).map(i => i.outerHTML.slice(0, 150)),
    named: all('main a').map(a => a.textContent.trim()),
    icon: all('link[rel=icon]').map(l => l.href), said: window.said,
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

contrast = """(() => { // {what: a few words} of what is nearer to its background than 4.5
  const numbers = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length<4 ? [...m, 1] : m }
  const over = (a, b) => [0,1,2].map(i => a[i]*a[3]+b[i]*(1-a[3])).concat(1)
  const part = v => v<=10.31475 ? v/3294.6 : ((v/255+.055)/1.055)**2.4
  const light = c => .2126*part(c[0])+.7152*part(c[1])+.0722*part(c[2])
  const behind = new Map([[null, [255,255,255,1]]])
  const ground = e => {
    if (!behind.has(e)) behind.set(e, over(numbers(getComputedStyle(e).backgroundColor), ground(e.parentElement)))
    return behind.get(e)
  }
  const found = {}, known = new Set()
  for (const e of document.querySelectorAll('body *')) {
    const asks = e.tagName==='INPUT' && e.placeholder
    if (!asks && ![...e.childNodes].some(t => t.nodeType===3 && t.textContent.trim())) continue
    let key = '' // what is alike in three generations is looked at once
    for (let p = e, i = 0; p && i<4; p = p.parentElement, i++) key += `${p.tagName}.${p.className} `
    if (known.has(key) || e.closest('svg, script, style, noscript') || !e.getBoundingClientRect().width) continue
    known.add(key)
    const own = getComputedStyle(e), colour = asks ? getComputedStyle(e, '::placeholder').color : own.color
    if (own.visibility==='hidden' || own.clip==='rect(0px, 0px, 0px, 0px)') continue
    let seen = 1
    for (let p = e; p; p = p.parentElement) seen *= getComputedStyle(p).opacity
    const g = ground(e), c = numbers(colour), [a,b] = [light(over([c[0],c[1],c[2],c[3]*seen], g)), light(g)]
    const ratio = (Math.max(a, b)+.05)/(Math.min(a, b)+.05)
    if (ratio<4.5) found[`${key}${ratio.toFixed(2)}`] = e.textContent.trim().slice(0, 30)
  }
  return found
})()"""
listens = """window.said = []
addEventListener('error', e => { // a style's typeface from elsewhere is allowed to be missing
  if (e.target.tagName!=='LINK') said.push(e.message || e.target.src || 'an error')
}, true)
addEventListener('unhandledrejection', e => said.push(String(e.reason)))
console.error = (...words) => said.push(words.join(' '))"""
loaded = """(() => { // those, too, that wait until they are scrolled to
  const all = [...document.images]
  all.forEach(i => i.loading = 'eager')
  return all.every(i => i.complete)
})()"""
scrolls = """[...document.querySelectorAll('main .sourceCode pre')].filter(p => p.scrollWidth>p.clientWidth+2)
  .map(p => p.textContent.slice(0, 80))"""

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

class Site:
    "The built site, served, with one browser"
    def __init__(self, folder):
        make = [sys.executable, root/'.ci'/'docs.py', 'smalldocs']
        with FileLock(root/'_proc.lock'): r = subprocess.run(make, capture_output=True, text=True)
        assert r.returncode==0, r.stderr
        self.warnings = [l for l in r.stderr.splitlines() if l.startswith('warning:')]
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=docs))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url,self.pages = f'http://127.0.0.1:{self.server.server_port}/',{}
        try:
            self.page = Page('about:blank', folder)
            self.page('Page.enable')
            self.page('Page.addScriptToEvaluateOnNewDocument', source=listens)
            self.size(1400)
            schemes = ['dark','light']
            for f in sorted(docs.rglob('*.html')):
                name = f.relative_to(docs).as_posix()
                self.open(name)
                wait(lambda: self.page.js(loaded), f'the pictures of {name} come')
                self.pages[name] = self.page.js(look)
                self.page.js("document.head.append(Object.assign(document.createElement('style'), "
                             "{textContent: '*{transition:none!important}'}))")
                schemes.reverse() # begins with that of the page before
                for scheme in schemes:
                    self.scheme(scheme)
                    self.pages[name][scheme] = self.page.js(contrast)
                self.pages[name]['scrolls'] = self.page.js(scrolls)
                self.size(phone)
                self.pages[name]['narrow'] = self.page.js(narrow)
                self.size(1400)
            self.scheme('light')
            self.size(1200)
            self.lost = self.pages.pop('404.html')
        except BaseException:
            self.server.shutdown()
            raise
    def size(self, w):
        self.page('Emulation.setDeviceMetricsOverride', width=w, height=900, deviceScaleFactor=1, mobile=w<600)
    def scheme(self, name):
        self.page('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=name)])
        dark = "document.documentElement.classList.contains('quarto-dark')"
        wait(lambda: self.page.js(dark)==(name=='dark'), f'the page gets {name}')
    def open(self, name):
        self.page('Page.navigate', url=self.url+name)
        there = (f"location.href=={self.url+name!r} && document.readyState=='complete' && "
                 "(!document.querySelector('.patch-explorer') || !!document.querySelector('.pe-picture'))")
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

def test_the_taught_code_is_on_the_page(site):
    "Cells marked `#| exports` are shown as they are"
    bare,n = lambda s: re.sub(r'\s', '', s),0
    for s in shown:
        if not s.endswith('.ipynb'): continue
        there = {bare(c) for c in site.pages[page_of(s)]['code']}
        for c in json.loads((root/'nbs'/s).read_text(encoding='utf-8'))['cells']:
            code = ''.join(c['source'])
            if c['cell_type']!='code' or not re.match(r'(#\|.*\n)*#\| exports\b', code): continue
            n += 1
            assert bare(re.sub(r'^#\|.*\n', '', code, flags=re.M)) in there, f'{page_of(s)} lacks {code[:100]}'
    assert n>60

def test_every_picture_has_words(site):
    for name,p in site.pages.items(): assert not p['silent'], f"{name}: no alternative text: {p['silent']}"

def test_alternative_texts_come_whole(site):
    "nbdev alone would keep the first of their lines"
    n = 0
    for f in sorted((root/'nbs').rglob('[!.]*.ipynb')):
        if '.ipynb_checkpoints' in f.parts: continue
        told = [' '.join(t.split()) for t in site.pages[page_of(f.relative_to(root/'nbs').as_posix())]['told']]
        for c in json.loads(f.read_text(encoding='utf-8'))['cells']:
            option = re.search(r'^#\| fig-alt:.*(\n#\|   .*)*', ''.join(c['source']), flags=re.M)
            if c['cell_type']!='code' or not option or not c['outputs']: continue
            n += 1
            alt = yaml.safe_load(re.sub(r'^#\| ?', '', option[0], flags=re.M))['fig-alt']
            assert alt in told, f'{f.name}: {alt[:80]}'
    assert n>100

def test_links_have_words(site):
    "A link's text is no file's name"
    for name,p in site.pages.items():
        bad = [w for w in p['named'] if re.fullmatch(r'(\d\d_\w+|\S+\.(ipynb|qmd|html))', w)]
        assert not bad, f'{name}: {bad}'

@pytest.mark.parametrize('scheme', ('light','dark'))
def test_contrast(site, scheme):
    for name,p in {**site.pages, '404.html': site.lost}.items():
        assert not p[scheme], f'{name}, {scheme}: {p[scheme]}'

def test_code_does_not_scroll(site):
    for name,p in site.pages.items(): assert not p['scrolls'], f"{name} at 1400 px: {p['scrolls']}"

def test_no_page_complains(site):
    for name,p in site.pages.items(): assert not p['said'], f"{name}: {p['said']}"

def test_icon_card_and_lost_page(site):
    assert Image.open(docs/'images'/'card.png').size==(1200,630)
    for name,p in site.pages.items(): assert (docs/p['icon'][0].removeprefix(site.url)).is_file(), name
    assert any(full.endswith('/index.html') for _,full in site.lost['links'])
    assert not list(docs.rglob('*.html.md')) # no twins in Markdown

def counts_of(method, **setting): # tokens at the start and after blocks 3, 6, 9 and 11, as the library says
    model = reduce_vit(twin_of(small), method, **setting)
    behind = dict(zip(reducers_of(model), token_counts(model)[1:]))
    return [256]+[behind[max(b for b in behind if b<=s)] for s in (3,6,9,11)]
small = timm.create_model('vit_tiny_patch16_224', img_size=256, embed_dim=48, num_heads=6)

@pytest.mark.parametrize('name', ('try_it.html','index.html'))
def test_explorer_in_the_page(site, name):
    "Sliders, a click, the keyboard: what is shown is what `token_counts` says"
    site.open(name)
    page,data = site.page,site.page.js('({rates: patchData.rates, r: patchData.r})')
    def number(m, what): return int(page.js(f"document.querySelector('figure[data-method={m}]').dataset.{what}"))
    def slide(i, to): # to a place of the i-th slider, counted from its left end
        page.js(f"(() => {{ const e = document.querySelectorAll('.pe-controls input')[{i}]; e.value = {to}; "
                "e.dispatchEvent(new Event('input', {bubbles: true})) })()")
    def middles(i): # the colour in the middle of each patch of the i-th picture
        return page.js(f"(() => {{ const c = document.querySelectorAll('.pe-picture canvas')[{i}].getContext('2d'); "
                       "return Array.from({length: 256}, (_, p) => "
                       "[...c.getImageData(p%16*21+10, Math.floor(p/16)*21+10, 1, 1).data].join()) })()")
    for place,(rate,r) in enumerate(reversed(list(zip(data['rates'], data['r'])))):
        slide(0, place)
        want = {m: counts_of(m, keep_rate=rate) for m in ('variance','medad')}
        want |= {m: counts_of(m, r=r) for m in ('tome','fold')}
        for stage in range(5):
            slide(1, stage)
            for m,counts in want.items():
                assert number(m, 'tokens')==counts[stage], (rate, stage, m)
                fused = number(m, 'tokens')-number(m, 'shown')
                assert 0<=fused<=min(stage, 3) if m in ('variance','medad') else fused==0, (rate, stage, m)
                said = page.js(f"document.querySelector('figure[data-method={m}] figcaption').innerText")
                assert f'{counts[stage]} tokens' in said
    slide(0, 2)
    for i,m in enumerate(('variance','medad')): # as many patches are painted over as have gone
        slide(1, 0)
        whole = middles(i)
        slide(1, 3)
        assert sum(a!=b for a,b in zip(whole, middles(i)))==256-number(m, 'shown')
    words = lambda: page.js("document.querySelector('.pe-why p').innerText")
    def click(selector, i=0, part=.5): # at a part of its width and height; the page scrolls there smoothly otherwise
        page.js(f"document.querySelectorAll({selector!r})[{i}]"
                ".scrollIntoView({block: 'center', behavior: 'instant'})")
        x,y,w,h = page.box(selector, i)
        for kind in ('mousePressed','mouseReleased'):
            page('Input.dispatchMouseEvent', type=kind, x=x+(part-.5)*w, y=y+(part-.5)*h, button='left', clickCount=1)
    click('.pe-picture canvas', 1, 8.5/16)
    assert words().startswith('Row 9, column 9.') and all(n in words() for n in ('variance','MedAD','ToMe','fold'))
    assert page.js("document.querySelectorAll('.pe-heads tr').length")==6
    page.js("document.querySelectorAll('.pe-picture')[3].focus()")
    page.key('ArrowRight', 39)
    assert words().startswith('Row 9, column 10.')
    page.key('ArrowDown', 40)
    assert words().startswith('Row 10, column 10.')
    page.js("document.querySelector('.pe-controls input').focus()")
    before = number('fold', 'tokens')
    page.key('ArrowLeft', 37)
    assert number('fold', 'tokens')<before # a lower keep rate
    page.js("document.querySelectorAll('.pe-photos button')[1].focus()")
    page.key('Enter', 13)
    assert page.js("document.querySelector('.pe-photos [aria-pressed=true]').innerText").strip()=='pagoda'
    page.js("document.querySelector('.pe-play').focus()")
    page.key('Enter', 13)
    assert page.js("document.querySelector('.pe-play').innerText")=='stop' and number('tome', 'tokens')==256
    wait(lambda: number('tome', 'tokens')<256, 'it plays')
    page.js("document.querySelector('.pe-play').focus()")
    page.key('Enter', 13)
    unnamed = page.js("[...document.querySelectorAll('.patch-explorer :is(input, button, [tabindex])')].filter(e => "
                      "!(e.labels?.length || e.getAttribute('aria-label') || e.innerText.trim())).length")
    assert unnamed==0 and page.js("!!document.querySelector('.pe-why [aria-live=polite]')")
    assert not page.js('window.said')

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
    quarto = next(s for s in runs['deploy'] if 'quarto' in s.get('uses', ''))
    assert re.fullmatch(r'\d+\.\d+\.\d+', quarto['with']['version']) # a new one changes pages and styles
    for f in (root/'.github'/'ISSUE_TEMPLATE').glob('*.yml'): yaml.safe_load(f.read_text(encoding='utf-8'))
    cite = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    assert cite['cff-version'] and cite['title'] and cite['authors']
