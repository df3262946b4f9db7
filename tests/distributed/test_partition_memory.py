import gc, hashlib
from pathlib import Path
import pytest, torch
from ranks import run_ranks

def config_of(base, data, output, **kw):
    from sparse_ds.config.schema import RunConfig
    return {
        "model": {"name_or_path": str(base), "quantization": kw.get("quantization","nf4"), "dtype": "bfloat16", "double_quantization": kw.get("dq", False)},
        "data": {"train": str(data), "eval": str(data), "num_eval_samples": 5, "sequence_length": 24},
        "method": {"density": 0.05, "interval_steps": 3, "estimation_steps": 2},
        "optimizer": {"learning_rate": 0.01, "momentum": 0.5},
        "train": {"output_dir": str(output), "max_steps": 5, "micro_batch_size": 1, "gradient_accumulation_steps": 2, "eval_interval_steps": 2, "gradient_checkpointing": kw.get("ckpt", False)},
        "export": {"merged": False},
        "monitor": {"progress_bar": False, "num_sample_prompts": 0},
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": 3000, "stage3_max_live_parameters": 60000, "stage3_prefetch_bucket_size": 20000, "stage3_max_reuse_distance": 0, **kw.get("zero", {})}},
    }

def explore(settings):
    import os
    from sparse_ds.config.schema import RunConfig
    from sparse_ds.distributed.launch_environment import complete_environment
    from sparse_ds.training import run as run_module
    from transformers import TrainerCallback
    out=[]
    orig=run_module._Training._bind
    def bind(self, total):
        orig(self,total)
        model=self.trainer.model
        mx=[0]
        def sample(*a):
            mx[0]=max(mx[0], sum(p.ds_numel for p in model.parameters() if p.ds_status.name!="NOT_AVAILABLE"))
        for m in model.modules(): m.register_forward_pre_hook(sample)
        class C(TrainerCallback):
            def on_step_end(s,*a,**k):
                big={}
                for o in gc.get_objects():
                    if isinstance(o,torch.Tensor) and type(o).__name__!="FakeTensor":
                        st=o.untyped_storage()
                        if st.nbytes()>1500: big[st.data_ptr()]=(st.nbytes(),o.dtype,tuple(o.shape), type(o).__name__)
                nam={p.ds_tensor.untyped_storage().data_ptr():n for n,p in model.named_parameters()}
                out.append((a[1].global_step, mx[0], [ (v, nam.get(d)) for d,v in sorted(big.items(), key=lambda x:-x[1][0])],
                  {n:p.ds_status.name for n,p in model.named_parameters() if p.ds_status.name!="NOT_AVAILABLE"}, max((p.ds_numel,n) for n,p in model.named_parameters())))
                mx[0]=0
        self.trainer.add_callback(C())
    run_module._Training._bind=bind
    run_module.run(RunConfig.model_validate(settings), complete_environment(os.environ), "cpu")
    return out

def test_explore(tiny_base,tiny_data,tmp_path):
    import time
    t=time.time()
    r=run_ranks(2, explore, config_of(tiny_base,tiny_data,tmp_path/"o"), join_group=False)
    print(time.time()-t)
    for s in r[0]:
        print(s[0],s[1],s[3],s[4])
    for x in r[0][-1][2]: print(x)
