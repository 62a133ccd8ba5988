"The explorer as a person uses it: JupyterLab in Chromium, a mouse and a keyboard."
import base64, json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import nbformat, pytest

chromium = next((p for p in map(shutil.which, ('chromium','chromium-browser','google-chrome','chrome')) if p), None)
try: import websocket # comes with jupyter_server
except ImportError: websocket = None
lab = Path(sys.executable).with_name('jupyter-lab')
needed = (('Chromium', chromium), ('websocket-client', websocket), ('JupyterLab', lab.exists()))
missing = [n for n,there in needed if not there]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"SKIPPED, the explorer was not tried in a browser: no {', '.join(missing)}")

class Page:
    "A page in headless Chromium, by its DevTools protocol"
    def __init__(self, url, folder, size=(1200,1000)):
        args = ['--headless=new','--no-sandbox','--disable-gpu','--disable-dev-shm-usage','--no-first-run',
                '--remote-debugging-port=0','--remote-allow-origins=*',f'--user-data-dir={folder}',
                '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1', # else what is elsewhere is waited for
                f'--window-size={size[0]},{size[1]}','about:blank']
        self.process = subprocess.Popen([chromium, *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        said = folder/'DevToolsActivePort'
        port = wait(lambda: said.exists() and said.read_text().split('\n')[0], 'Chromium starts')
        listed = lambda: json.load(urllib.request.urlopen(f'http://127.0.0.1:{port}/json'))
        pages = wait(lambda: [p for p in listed() if p['type']=='page'], 'a page opens')
        self.ws,self.n = websocket.create_connection(pages[0]['webSocketDebuggerUrl'], timeout=30),0
        self('Emulation.setDeviceMetricsOverride', width=size[0], height=size[1], deviceScaleFactor=1, mobile=False)
        self('Emulation.setFocusEmulationEnabled', enabled=True) # without a focus JupyterLab has no current notebook
        self('Page.navigate', url=url)
    def __call__(self, method, **params):
        self.n += 1
        self.ws.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while (answer := json.loads(self.ws.recv())).get('id')!=self.n: pass
        assert 'error' not in answer, answer
        return answer['result']
    def js(self, code):
        answer = self('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in answer, answer
        return answer['result'].get('value')
    def box(self, selector, i=0): # middle and size of an element, scrolled into view
        return self.js(f"(()=>{{const e=document.querySelectorAll({selector!r})[{i}]; if(!e) return null; "
                       "e.scrollIntoView({block:'nearest'}); const r=e.getBoundingClientRect(); "
                       "return [r.x+r.width/2, r.y+r.height/2, r.width, r.height]})()")
    def click(self, selector, i=0):
        x,y = self.box(selector, i)[:2]
        for kind in ('mousePressed','mouseReleased'):
            self('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)
    def key(self, name, code):
        for kind in ('keyDown','keyUp'):
            text = dict(text='\r') if name=='Enter' and kind=='keyDown' else {}
            self('Input.dispatchKeyEvent', type=kind, key=name, code=name, windowsVirtualKeyCode=code, **text)
    def picture(self): return base64.b64decode(self('Page.captureScreenshot', format='png')['data'])
    def close(self):
        try: self('Browser.close')
        except Exception: pass # it was gone before
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()

def wait(f, what, seconds=90):
    end = time.time()+seconds
    while time.time()<end:
        try:
            if found := f(): return found
        except (OSError, ValueError): pass
        time.sleep(.02)
    raise AssertionError(f'not within {seconds} s: {what}')

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

class Lab:
    "A notebook in JupyterLab, run from top to bottom"
    def __init__(self, folder, cells, size=(1200,1000)):
        kernel = dict(name='python3', display_name='python3', language='python')
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells],
                                      metadata=dict(kernelspec=kernel))
        (folder/'work').mkdir()
        nbformat.write(nb, folder/'work'/'explore.ipynb')
        port = free_port()
        env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1]), 'OMP_NUM_THREADS': '1',
               'JUPYTER_CONFIG_DIR': str(folder/'config'), 'JUPYTER_DATA_DIR': str(folder/'data'),
               'JUPYTER_RUNTIME_DIR': str(folder/'runtime'), 'IPYTHONDIR': str(folder/'ipython')}
        self.log = open(folder/'lab.log', 'w')
        self.server = subprocess.Popen(
            [lab, '--allow-root','--no-browser','--ServerApp.ip=127.0.0.1',"--IdentityProvider.token=",
             '--LabApp.expose_app_in_browser=True','--port',str(port),
             f"--ServerApp.root_dir={folder/'work'}"], stdout=self.log, stderr=self.log, env=env)
        self.page = None
        try:
            wait(lambda: urllib.request.urlopen(f'http://127.0.0.1:{port}/api').status==200, 'JupyterLab starts')
            url = f'http://127.0.0.1:{port}/lab/workspaces/auto-a/tree/explore.ipynb?reset'
            self.page = p = Page(url, folder/'chromium', size)
            ready = ("w.sessionContext?.isReady && w.sessionContext.session?.kernel?.status==='idle' && "
                     "(jupyterapp.shell.activateById(w.id), true)")
            wait(lambda: p.js("window.jupyterapp && [...jupyterapp.shell.widgets('main')].some("
                              f"w => {ready})"), 'the notebook opens and its kernel starts')
            p.js("jupyterapp.shell.collapseLeft(), jupyterapp.commands.execute('notebook:run-all-cells'), 1")
        except BaseException:
            self.close()
            raise
    def close(self):
        if self.page: self.page.close()
        self.server.terminate()
        try: self.server.wait(10)
        except subprocess.TimeoutExpired: self.server.kill()
        self.log.close()

@pytest.fixture
def page(tmp_path):
    lab = Lab(tmp_path, ["import timm, torch; torch.manual_seed(0)\nfrom attn_diversity.explorer import PruneExplorer\n"
                         "PruneExplorer(timm.create_model('vit_tiny_patch16_224', img_size=96, depth=4, "
                         "num_classes=3), classes=['cat','dog','tree'])"])
    yield lab.page
    lab.close()

def text(page): return page.js("document.querySelector('.ad-explorer')?.innerText") or ''

def pictures(page): # a number for each
    return page.js(
        "Promise.all([...document.querySelectorAll('.ad-explorer img')].map(async i => { "
        "const b = new Uint8Array(await (await fetch(i.src)).arrayBuffer()); let h = 0; "
        "for (const v of b) h = (h*31+v)|0; return h }))")

def choose(page, name): # in whichever list has it
    assert page.js(f"(()=>{{for (const e of document.querySelectorAll('.ad-explorer select')) {{ "
                   f"const o=[...e.options].find(o=>o.text.replace(/\\u00a0/g,' ')==={name!r}); if (!o) continue; "
                   "e.value=o.value; e.dispatchEvent(new Event('change',{bubbles:true})); return true}})()"), name

def test_the_explorer_answers_mouse_and_keyboard(page):
    said = lambda: text(page)
    wait(lambda: 'GFLOPs' in said(), 'the panel appears')
    assert page.js("document.querySelectorAll('.ad-grid button').length")==36 and len(pictures(page))==2
    assert 'keep_rate=0.7' in said() and 'unpruned:' in said() and 'Traceback' not in page.js("document.body.innerText")
    assert page.js("document.querySelectorAll('[data-mime-type$=stderr]').length")==0 # no red lines
    number = lambda pattern: re.search(pattern, said()).group(1)

    # the buttons lie on the patches of the picture
    x,y,w,h = page.box('.ad-explorer img')
    bx,by,bw,bh = page.box('.ad-grid button', 0)
    assert abs(bx-bw/2-(x-w/2))<2 and abs(by-bh/2-(y-h/2))<2 and abs(6*bw-w)<2 and abs(6*bh-h)<2

    # the keep rate by keyboard: fewer patches, fewer GFLOPs, another picture and another line of code
    before,left,cost = pictures(page),int(number(r'(\d+) of 36 patches')),float(number(r'([\d.]+) GFLOPs'))
    page.js("document.querySelector('.ad-explorer .noUi-handle').focus()")
    for _ in range(4): page.key('ArrowLeft', 37)
    wait(lambda: 'keep_rate=0.5)' in said(), 'the keep rate changes')
    wait(lambda: pictures(page)[0]!=before[0], 'the picture changes')
    assert int(number(r'(\d+) of 36 patches'))<left and float(number(r'([\d.]+) GFLOPs'))<cost

    # the method
    before = pictures(page)
    choose(page, 'MedAD')
    wait(lambda: "'medad'" in said(), 'the method changes')
    wait(lambda: pictures(page)[1]!=before[1], 'the score map changes')

    # a click on a patch: its reasons, counted from 0, and a frame in both pictures
    before = pictures(page)
    page.click('.ad-grid button', 8)
    wait(lambda: 'Patch 8 (row 1, column 2)' in said(), 'the reasons for patch 8')
    assert re.search(r'(stays|goes).*rank \d+ of \d+', said()) and '\n0\t' in said()
    wait(lambda: all(a!=b for a,b in zip(pictures(page), before)), 'the frame moves')

    # groups, and beside them another method's patches
    before = pictures(page)
    choose(page, 'fold')
    wait(lambda: re.search(r"'fold', r=\d+\) # as many tokens", said()), 'the method merges')
    wait(lambda: re.search(r'Patch 8 .* (shares its token with|is a token of its own)', said()), 'where patch 8 is')
    choose(page, 'MedAD, as many tokens')
    wait(lambda: re.search(r'MedAD: \d+ of 36 patches after block 3', said()), 'another method beside it')
    wait(lambda: all(a!=b for a,b in zip(pictures(page), before)), 'both pictures change')

    # all heads at once, not stretched
    choose(page, 'all heads')
    wait(lambda: 'all heads in block 3' in said(), 'the heads')
    wait(lambda: page.js("(e => Math.abs(e.clientWidth/e.clientHeight - e.naturalWidth/e.naturalHeight)<.03 && "
                         "e.clientHeight<e.clientWidth/2)(document.querySelectorAll('.ad-explorer img')[1])"),
         'their shape')

    # a wrong path is a message, and the panel lives on; the figure is a link
    page.click('.ad-explorer .widget-text input')
    page('Input.insertText', text='nowhere.jpg')
    page.key('Enter', 13)
    wait(lambda: 'nowhere.jpg is not there' in said(), 'the message')
    page.js("[...document.querySelectorAll('.ad-explorer button')].find(b=>b.innerText.includes('Figure')).click()")
    link = wait(lambda: page.js("document.querySelector('.ad-explorer a[download]')?.href"), 'the link')
    assert base64.b64decode(link.split(',')[1])[:8]==b'\x89PNG\r\n\x1a\n'
    assert 'Traceback' not in page.js("document.body.innerText")

    # at any width sliders have a track, pictures fit, and what is said of a patch does not move them
    choose(page, 'variance')
    for width in (1400, 1000, 700, 500):
        page('Emulation.setDeviceMetricsOverride', width=width, height=2000, deviceScaleFactor=1, mobile=False)
        place = lambda: page.js("[...document.querySelectorAll('.ad-explorer img, .ad-explorer .noUi-target')].map("
                                "e => (r => [r.x, r.y, r.width, r.height])(e.getBoundingClientRect()))")
        time.sleep(.5) # JupyterLab lays out
        places,panel = {},page.box('.ad-explorer')[2]
        for i in (0, 14, 21, 35):
            page.click('.ad-grid button', i)
            wait(lambda: f'Patch {i} (' in said(), f'the reasons for patch {i}')
            places[i] = place()
        assert all(p==places[0] for p in places.values()), (width, places)
        assert all(w>=100 if h<50 else w<=panel for _,_,w,h in places[0]), (width, panel, places[0])
