//! `jedi synth-data`: sets that share a subject, to train on.

use anyhow::{Result, bail};

use crate::cli::{SynthDataArgs, SynthSource};
use crate::interrupt::Interrupt;
use crate::report;
use crate::synth::toybox::ToyboxSource;
use crate::synth::{Packing, Part, ToyboxData, write_toybox};

pub fn run(args: SynthDataArgs) -> Result<()> {
    let SynthSource::Toybox = args.source;
    let data = ToyboxData {
        folder: args.out,
        source: ToyboxSource { seed: args.seed, sets: args.sets, images: args.images, size: args.size as u32 },
        masks: args.masks,
        packing: match args.per_shard {
            0 => Packing::Folder,
            sets_per_shard => Packing::Shards { sets_per_shard },
        },
        part: Part::new(args.shard.index, args.shard.count)?,
    };
    let interrupt = Interrupt::install()?;
    let bar = report::progress(args.sets as u64, "drawing");
    let mut show = |done: usize, total: usize| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    };
    let summary = write_toybox(&data, &mut show, &|| interrupt.requested())?;
    bar.finish_and_clear();
    let place = data.folder.display();
    let (written, kept) = (summary.written, summary.kept);
    report::note(format!("{place}: {written} sets of {} pictures written, {kept} were there", data.source.images));
    if summary.missing > 0 {
        bail!("interrupted, {} sets are missing; run the same command again to go on", summary.missing);
    }
    Ok(report::result(place.to_string())?)
}
