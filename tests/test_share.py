"What leaves Python and what goes to others: the formats on disk, and a hub on this machine."
import base64, hashlib, json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import huggingface_hub, numpy as np, pytest, timm, torch
from huggingface_hub import constants
from PIL import Image
from attn_diversity import share, trained
from attn_diversity.data import digits_dls, seen_by
from attn_diversity.learner import load_vit, prune_learner, save_vit
from attn_diversity.methods import METHODS, method_config, reduce_vit
from attn_diversity.predict import predict
from conftest import say

class Hub(BaseHTTPRequestHandler):
    "What huggingface_hub asks of a hub to make a repository, commit small files to it and fetch them"
    commit,may_write = '0'*39+'1',True
    def say(self, status, body=b'', **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for k,v in {'Content-Length': len(body), **headers}.items(): self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command!='HEAD': self.wfile.write(body)
    def body(self):
        if self.headers.get('Transfer-Encoding')!='chunked': return self.rfile.read(int(self.headers['Content-Length']))
        parts = []
        while n := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(n))
            self.rfile.readline()
        return b''.join(parts)
    def do_POST(self):
        said,repos = self.body(),self.server.repos
        *_,owner,name,what,_ = ['','','','',*self.path.split('/')]
        if self.path=='/api/validate-yaml': return self.say(200, dict(errors=[], warnings=[]))
        if not self.server.may_write: return self.say(403, dict(error='read only'))
        if self.path=='/api/repos/create':
            made = json.loads(said)
            repos.setdefault(f"{made['organization']}/{made['name']}", {})
            self.say(200, dict(url=f"http://{self.headers['Host']}/{made['organization']}/{made['name']}"))
        elif what=='preupload':
            files = [dict(path=f['path'], uploadMode='regular', shouldIgnore=False) for f in json.loads(said)['files']]
            self.say(200, dict(files=files))
        elif what=='commit':
            files = [l['value'] for l in map(json.loads, said.splitlines()) if l['key']=='file']
            repos[f'{owner}/{name}'].update({f['path']: base64.b64decode(f['content']) for f in files})
            url = f"http://{self.headers['Host']}/{owner}/{name}/commit/{self.commit}"
            self.say(200, dict(commitUrl=url, commitOid=self.commit))
        else: self.say(404)
    def do_GET(self):
        path,repos = self.path.split('?')[0].strip('/').split('/'),self.server.repos
        api = path[:2]==['api','models']
        repo,rest = '/'.join(path[2:4] if api else path[:2]),path[4:] if api else path[2:]
        files = repos.get(repo)
        self.server.asked.append(rest)
        if files is None: return self.say(404, dict(error='no'), X_Error_Code='RepoNotFound')
        if api and rest[:1]==['tree']:
            return self.say(200, [dict(type='file', path=f, size=len(b), oid=hashlib.sha1(b).hexdigest())
                                  for f,b in files.items()])
        if api: return self.say(200, dict(id=repo, sha=self.commit, siblings=[dict(rfilename=f) for f in files]))
        body = files.get('/'.join(rest[2:]))
        if body is None: return self.say(404, dict(error='no'), X_Error_Code='EntryNotFound')
        self.say(200, body, X_Repo_Commit=self.commit, ETag=f'"{hashlib.sha1(body).hexdigest()}"')
    do_HEAD = do_GET
    def log_message(self, *args): pass

size = dict(patch_size=8, depth=4, embed_dim=48, num_heads=3)
def tiny(**kw): return timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=10, **size, **kw)

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A folder as a training leaves it, with more in it than is to be shared, and its name in model.json"
    folder = tmp_path_factory.mktemp('runs')/'digits'
    dls = digits_dls(img_size=32, batch_size=64)
    learn = prune_learner(dls, 'vit_tiny_patch16_224', keep_rate=.5, pretrained=False, **size)
    save_vit(learn, folder, accuracy=.9, data=str(folder), valid_loss=.25)
    (folder/'checkpoints').mkdir()
    torch.save(dict(a=1), folder/'checkpoints'/'epoch.pt')
    return folder

@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.repos,server.asked,server.may_write = {},[],True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setattr(constants, 'ENDPOINT', url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url+'/{repo_id}/resolve/{revision}/{filename}')
    fetch = huggingface_hub.snapshot_download
    monkeypatch.setattr(share, 'snapshot_download', lambda *a, **kw: fetch(*a, cache_dir=tmp_path/'cache', **kw))
    yield server
    server.shutdown()
    server.server_close()

def test_there_and_back(run, hub):
    url = share.push_vit(run, 'ada/digits', token='hf_x', license='mit')
    assert url.endswith('/ada/digits')
    there = hub.repos['ada/digits']
    assert set(there)=={'model.safetensors','model.json','README.md'}
    assert str(run).encode() not in there['model.json']+there['README.md'] # no folder of this machine
    there.update({'pytorch_model.bin': b'a pickle', 'config.py': b'import os'})
    back,model,x = share.pull_vit('ada/digits'),load_vit(run),torch.randn(4,3,32,32)
    with torch.no_grad(): assert torch.equal(back(x), model(x))
    assert method_config(back)==method_config(model) and back.recipe['info']['data']=='digits'
    fetched = {rest[-1] for rest in hub.asked if rest[:1]==['resolve']}
    assert fetched=={'model.safetensors','model.json','README.md'}
    hub.server_close() # once fetched, it is there without a network
    hub.shutdown()
    assert share.pull_folder('ada/digits').is_dir()

def test_each_by_one_command(run, hub, monkeypatch, tmp_path):
    "Shared, and asked, measured and exported by its name"
    monkeypatch.setenv('HF_TOKEN', 'hf_x')
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32,32,3), dtype=np.uint8)).save('a.png')
    shared = say('attn_diversity_share', run, 'ada/digits', '--license', 'mit')
    assert not shared.stderr and 'attn_diversity_predict hf:ada/digits' in shared.stdout, shared
    assert b'license: mit' in hub.repos['ada/digits']['README.md']
    here,there = (say('attn_diversity_predict', r, 'a.png', '--form', 'csv') for r in (run,'hf:ada/digits'))
    assert here.stdout==there.stdout and there.returncode==0, (here, there)
    exported = say('attn_diversity_export', 'hf:ada/digits', '--torch', '--seconds', 0)
    assert exported.returncode==0 and (tmp_path/'digits'/'model.pt2').is_file(), exported
    for i in range(20):
        folder = tmp_path/'photos'/str(i%10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.open('a.png').rotate(9*i).save(folder/f'{i}.png')
    asked = 'hf:ada/digits','photos','--seconds',0
    measured,by_folder = (say('attn_diversity_evaluate', r, *asked[1:], '--out', o)
                          for r,o in ((asked[0],'m1'),(run,'m2')))
    assert measured.returncode==by_folder.returncode==0, (measured, by_folder)
    assert (tmp_path/'m1'/'photographs.csv').read_text()==(tmp_path/'m2'/'photographs.csv').read_text()
    real = trained.choose
    def something(*args, **kw): # chosen, whatever is faster today
        found = real(*args, **kw)
        return found._replace(setting={**found.setting, 'method': 'tome'})
    monkeypatch.setattr(trained, 'choose', something)
    chosen = say('attn_diversity_choose', *asked, '--loss', 90, '--methods', 'tome', '--keep_rates', .5,
                 '--out', 'fast')
    assert chosen.returncode==0, chosen
    assert json.loads((tmp_path/'fast'/'model.json').read_text())['info']['chosen_from']=='hf:ada/digits'
    for words,said in ((('share', run/'gone', 'ada/digits'), 'gone'), (('share', run, 'digits'), "'ada/digits'"),
                       (('predict', 'hf:ada/gone', 'a.png'), 'The hub has no ada/gone')):
        refused = say(f'attn_diversity_{words[0]}', *words[1:])
        assert refused.returncode==1 and said in refused.stderr and 'Traceback' not in refused.stderr, refused

def test_own_words_and_no_rights(run, hub):
    (run/'README.md').write_text('my own words')
    try: share.push_vit(run, 'ada/digits', token='hf_x')
    finally: (run/'README.md').unlink()
    assert hub.repos['ada/digits']['README.md']==b'my own words'
    hub.may_write = False
    with pytest.raises(PermissionError, match='are you logged in'): share.push_vit(run, 'ada/digits', token='hf_x')

def test_what_the_hub_lacks(run, hub, monkeypatch):
    with pytest.raises(FileNotFoundError, match='The hub has no ada/gone'): share.pull_vit('ada/gone')
    with pytest.raises(ValueError, match="a name such as 'ada/digits'"): share.pull_vit('a/b/c')
    hub.repos['ada/other'] = {'README.md': b'no model'}
    with pytest.raises(FileNotFoundError, match='ada/other holds no model.json'): share.pull_vit('ada/other')
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9') # nobody there
    with pytest.raises(ConnectionError, match='is there a network'): share.pull_vit('ada/new')
    with pytest.raises(ConnectionError, match='is there a network'): share.push_vit(run, 'ada/digits', token='hf_x')
    with pytest.raises(FileNotFoundError, match='no model.json'): share.push_vit(run/'checkpoints', 'ada/digits')

@pytest.mark.parametrize('method', METHODS)
def test_a_card_for_each_method(method):
    model = reduce_vit(tiny(), method).eval()
    before = method_config(model)
    model.recipe = dict(arch=None, arch_args={}, img_size=[32,48], classes=list('abc')*10, mean=[.5], std=[.5],
                        stride=None, pruning=before, info={}, versions=dict(torch='2'))
    card = share.model_card('somewhere', 'ada/m', model)
    assert f'| made cheaper by | {method}' in card.text and '32 x 48 pixels' in card.text and '30: a, b' in card.text
    assert card.data.eval_results is None and method_config(model)==before
    share.ModelCard(str(card)).data.to_dict() # as the hub would read it

def test_a_file_for_what_is_no_photograph(tmp_path):
    "One channel; a model that trains in half precision stays as it is; what a file sees is what the model saw"
    model = reduce_vit(tiny(in_chans=1), keep_rate=.5).half().train()
    file = share.load_exported(share.export_vit(model, tmp_path, 'torch'))
    assert isinstance(file, share.Exported) and model.training and next(model.parameters()).dtype==torch.half
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60,50,3), dtype=np.uint8))
    assert torch.equal(seen_by(file, picture), seen_by(model.float().eval(), picture))
    best = [predict(m, picture, top=1, classes='abcdefghij')['class'].item() for m in (file, model)]
    assert best[0]==best[1]

def test_what_is_refused(tmp_path, monkeypatch):
    model = tiny()
    def fickle(a): return a.mean(1)*float(a.mean()>0) # a Python number out of a tensor
    with pytest.raises(ValueError, match='cannot be exported. Is an indicator'):
        share.export_vit(reduce_vit(tiny(), fickle), tmp_path/'a.pt2')
    save,other = share._SAVERS['torch'],tiny().eval()
    monkeypatch.setitem(share._SAVERS, 'torch', lambda net, *args: save(other, *args)) # an exporter with a fault
    with pytest.raises(ValueError, match='does not answer as PyTorch does: for half of 8 pictures'):
        share.export_vit(model, tmp_path/'a.pt2')
    assert not list(tmp_path.iterdir()) # nothing half done stays
    monkeypatch.setattr(share, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match='pip install onnx onnxscript'): share.export_vit(model, tmp_path/'a.onnx')
    (tmp_path/'bad.pt2').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='cannot be opened'): share.load_exported(tmp_path/'bad.pt2')
