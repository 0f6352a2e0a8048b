//! The watch over ranks that are gone: killed, out of memory, or on a machine that fell over. MPI's own calls wait for such a
//! rank for ever, so every rank keeps a TCP connection to the first one. A process that ends closes it at once, whatever
//! killed it; from a machine that is gone no beat comes any more. Work that only takes long goes on beating, on its thread.

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// Between two signs of life.
const BEAT: Duration = Duration::from_secs(5);
/// After so long without one a rank is gone.
const SILENCE: Duration = Duration::from_secs(40);
/// For all ranks to report.
const GATHERING: Duration = Duration::from_secs(30);
const CONNECTING: Duration = Duration::from_secs(3);

const ALIVE: u8 = 1;
const GOODBYE: u8 = 2;
const LOST: u8 = 3;

/// A rank that is gone.
#[derive(Clone, Debug)]
pub struct Loss {
    /// Who, where, and how that was noticed.
    pub message: String,
    /// The first rank tells it.
    pub is_told: bool,
}

/// The connections of this rank, and the threads that listen to them.
pub struct Watch(Arc<Shared>);

struct Shared {
    /// To write to; on the first rank one for each other rank, elsewhere one.
    peers: Mutex<Vec<TcpStream>>,
    is_over: AtomicBool,
    end: Box<dyn Fn(Loss) + Send + Sync>,
}

/// Where the first rank waits for the reports of the others.
pub struct Post {
    listener: TcpListener,
    token: u64,
    address: String,
}

impl Post {
    /// On every network of this machine.
    pub fn open() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).context("no port for the watch over ranks")?;
        let token = RandomState::new().hash_one(process::id());
        let port = listener.local_addr()?.port();
        let places: Vec<String> = own_addresses().iter().map(|ip| ip.to_string()).collect();
        let address = format!("{token}|{port}|{}|{}", places.join(","), own_name());
        Ok(Self { listener, token, address })
    }

    /// What the others need to know to report.
    pub fn address(&self) -> String {
        self.address.clone()
    }

    /// Waits for the reports of all other ranks of `count`.
    pub fn gather(self, count: usize, end: impl Fn(Loss) + Send + Sync + 'static) -> Result<Watch> {
        self.listener.set_nonblocking(true)?;
        let deadline = Instant::now() + GATHERING;
        let mut reported: Vec<Option<(TcpStream, String)>> = (0..count).map(|_| None).collect();
        while reported[1..].iter().any(Option::is_none) {
            match self.listener.accept() {
                // Whoever else knocks at the port is not heard.
                Ok((stream, _)) => {
                    if let Ok((rank, name, stream)) = self.report_from(stream, count) {
                        reported[rank] = Some((stream, name));
                    }
                }
                Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => {
                    ensure!(Instant::now() < deadline, "some ranks did not report");
                    thread::sleep(Duration::from_millis(5));
                }
                Err(cause) => return Err(cause).context("the watch over ranks"),
            }
        }
        let reported: Vec<(usize, (TcpStream, String))> =
            reported.into_iter().enumerate().filter_map(|(rank, report)| Some((rank, report?))).collect();
        let peers = reported.iter().map(|(_, (stream, _))| stream.try_clone()).collect::<io::Result<_>>()?;
        let shared = Shared::start(peers, end)?;
        for (rank, (stream, name)) in reported {
            let shared = shared.clone();
            let message = move |how: &str| format!("rank {rank} of {count} ({name}) is gone: {how}");
            listen(stream, shared, message)?;
        }
        Ok(Watch(shared))
    }

    /// Number and name of the rank that connected.
    fn report_from(&self, mut stream: TcpStream, count: usize) -> Result<(usize, String, TcpStream)> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(CONNECTING))?;
        let mut head = [0; 14];
        stream.read_exact(&mut head)?;
        let (token, rest) = head.split_at(8);
        ensure!(token == self.token.to_le_bytes(), "a stranger");
        let rank = u32::from_le_bytes(rest[..4].try_into()?) as usize;
        let mut name = vec![0; u16::from_le_bytes(rest[4..].try_into()?).into()];
        stream.read_exact(&mut name)?;
        ensure!((1..count).contains(&rank), "a stranger");
        stream.write_all(token)?;
        Ok((rank, String::from_utf8_lossy(&name).into_owned(), stream))
    }
}

impl Watch {
    /// Reports rank `rank` to the first rank at `address`.
    pub fn report_to(address: &str, rank: usize, end: impl Fn(Loss) + Send + Sync + 'static) -> Result<Self> {
        let mut parts = address.splitn(4, '|');
        let mut next = || parts.next().context("the first rank gave no address");
        let (token, port, places, name) = (next()?.parse::<u64>()?, next()?.parse()?, next()?, next()?.to_owned());
        let places = places.split(',').filter_map(|ip| Some(SocketAddr::new(ip.parse().ok()?, port)));
        let Some(stream) = places.filter_map(|place| report(place, token, rank).ok()).next() else {
            bail!("rank {rank} ({}) cannot reach the first one ({name}) by TCP", own_name());
        };
        let shared = Shared::start(vec![stream.try_clone()?], end)?;
        let message = move |how: &str| format!("rank 0 ({name}) is gone: {how}");
        listen(stream, shared.clone(), message)?;
        Ok(Self(shared))
    }

    /// From now on nobody is missed. To be called where all ranks are about to end.
    pub fn dismiss(self) {
        self.0.is_over.store(true, Ordering::SeqCst);
        self.0.tell(GOODBYE);
    }
}

impl Shared {
    /// Beats from now on.
    fn start(peers: Vec<TcpStream>, end: impl Fn(Loss) + Send + Sync + 'static) -> Result<Arc<Self>> {
        let shared = Arc::new(Self { peers: Mutex::new(peers), is_over: AtomicBool::new(false), end: Box::new(end) });
        let beating = shared.clone();
        let beat = move || {
            while !beating.is_over.load(Ordering::SeqCst) {
                beating.tell(ALIVE);
                thread::sleep(BEAT);
            }
        };
        thread::Builder::new().name("beat".to_owned()).spawn(beat)?;
        Ok(shared)
    }

    fn tell(&self, word: u8) {
        let mut peers = self.peers.lock().expect("nothing panics while it holds the lock");
        // One that cannot be written to is noticed by whoever listens to it.
        peers.iter_mut().for_each(|peer| drop(peer.write_all(&[word])));
    }

    fn lost(&self, message: String, is_told: bool) {
        // The first loss ends the run; others follow from it.
        if self.is_over.swap(true, Ordering::SeqCst) {
            return;
        }
        // On the first rank to all others, elsewhere to the first.
        self.tell(LOST);
        (self.end)(Loss { message, is_told });
    }
}

/// Listens on a thread of its own until the peer is gone or says goodbye.
fn listen(mut stream: TcpStream, shared: Arc<Shared>, message: impl Fn(&str) -> String + Send + 'static) -> Result<()> {
    stream.set_read_timeout(Some(SILENCE))?;
    let hear = move || {
        let mut word = [0];
        loop {
            let how = match stream.read(&mut word) {
                Ok(1) if word[0] == ALIVE => continue,
                Ok(1) if word[0] == GOODBYE => return,
                Ok(1) if word[0] == LOST => return shared.lost("another rank is gone".to_owned(), true),
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => continue,
                Err(cause) if matches!(cause.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    format!("not heard of for {} s", SILENCE.as_secs())
                }
                _ => "its process ended".to_owned(),
            };
            return shared.lost(message(&how), false);
        }
    };
    thread::Builder::new().name("watch".to_owned()).spawn(hear)?;
    Ok(())
}

/// Connects and reports; an answer with the right token says that it was the right door.
fn report(place: SocketAddr, token: u64, rank: usize) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&place, CONNECTING)?;
    stream.set_read_timeout(Some(CONNECTING))?;
    let name = own_name();
    let mut hello = token.to_le_bytes().to_vec();
    hello.extend(u32::try_from(rank)?.to_le_bytes());
    hello.extend(u16::try_from(name.len())?.to_le_bytes());
    hello.extend(name.as_bytes());
    stream.write_all(&hello)?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer)?;
    ensure!(answer == token.to_le_bytes(), "a stranger");
    Ok(stream)
}

/// Machine and process.
fn own_name() -> String {
    format!("{}, process {}", host(), process::id())
}

fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "this machine".to_owned() } else { name.trim().to_owned() }
}

/// Addresses that other machines may know this one by, then the one that it has for itself.
fn own_addresses() -> Vec<IpAddr> {
    let named = (host(), 0u16).to_socket_addrs().into_iter().flatten().map(|address| address.ip());
    let routed = fs::read_to_string("/proc/net/fib_trie").unwrap_or_default();
    let mut all: Vec<IpAddr> = vec![];
    for ip in named.chain(local_addresses(&routed)) {
        if !ip.is_loopback() && ip.is_ipv4() && !all.contains(&ip) {
            all.push(ip);
        }
    }
    all.push(Ipv4Addr::LOCALHOST.into());
    all
}

/// The machine's own addresses in its routing table: a line `|-- 10.0.0.5` above one with `host LOCAL`.
fn local_addresses(table: &str) -> Vec<IpAddr> {
    let lines: Vec<&str> = table.lines().map(str::trim).collect();
    let own = |pair: &[&str]| pair[1].ends_with("host LOCAL").then(|| pair[0].strip_prefix("|-- ")?.parse().ok())?;
    lines.windows(2).filter_map(own).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    /// A watch of three: what each rank hears, and how each leaves.
    fn three() -> Vec<(Watch, Receiver<Loss>)> {
        let post = Post::open().unwrap();
        let address = post.address();
        let others = [1, 2].map(|rank| {
            let address = address.clone();
            let (tell, hear) = channel();
            let join = thread::spawn(move || Watch::report_to(&address, rank, move |loss| drop(tell.send(loss))));
            (join, hear)
        });
        let (tell, hear) = channel();
        let mut all = vec![(post.gather(3, move |loss| drop(tell.send(loss))).unwrap(), hear)];
        all.extend(others.map(|(join, hear)| (join.join().unwrap().unwrap(), hear)));
        all
    }

    /// As the system does for a process that ends.
    fn kill(watch: &Watch) {
        watch.0.is_over.store(true, Ordering::SeqCst);
        for peer in watch.0.peers.lock().unwrap().iter() {
            peer.shutdown(std::net::Shutdown::Both).unwrap();
        }
    }

    #[test]
    fn a_rank_that_is_gone_is_named_by_the_first_and_ends_the_others() {
        let all = three();
        kill(&all[2].0);
        let told = all[0].1.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(told.message.starts_with("rank 2 of 3 (") && !told.is_told, "{told:?}");
        assert!(all[1].1.recv_timeout(Duration::from_secs(5)).unwrap().is_told);
    }

    #[test]
    fn without_the_first_rank_all_others_name_it() {
        let all = three();
        kill(&all[0].0);
        for (_, hear) in &all[1..] {
            let told = hear.recv_timeout(Duration::from_secs(5)).unwrap();
            assert!(told.message.starts_with("rank 0 (") && !told.is_told, "{told:?}");
        }
    }

    #[test]
    fn nobody_is_missed_behind_a_goodbye() {
        let (watches, ears): (Vec<Watch>, Vec<Receiver<Loss>>) = three().into_iter().unzip();
        watches.into_iter().for_each(Watch::dismiss);
        thread::sleep(Duration::from_millis(200));
        assert!(ears.iter().all(|hear| hear.try_recv().is_err()));
    }

    #[test]
    fn own_addresses_are_those_that_the_routing_table_calls_local() {
        let table = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 10.0.0.0\n        /24 link UNICAST\n     |-- 10.0.0.5\n        /32 \
                     host LOCAL\n     |-- 10.0.0.255\n        /32 link BROADCAST\n";
        assert_eq!(local_addresses(table), ["10.0.0.5".parse::<IpAddr>().unwrap()]);
    }
}
