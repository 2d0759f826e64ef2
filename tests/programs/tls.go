// HTTP over crypto/tls at both ends, for tests/go.rs. Standard library only, so that it builds without a network.
//
//	tls serve PORT CERT        HTTPS, HTTP/1.1 and HTTP/2; writes its certificate to CERT, then "ready"
//	tls proxy PORT CERT TO     HTTPS that passes everything on to such a server
//	tls plain PORT             HTTP
//	tls client PORT WHAT ...   asks such a server; ends with 0 when every answer was right
//	tls pipe                   both ends in this process, on no socket
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Answers that were right.
var checked struct {
	sync.Mutex
	n int
}

func main() {
	log.SetFlags(0)
	switch os.Args[1] {
	case "serve":
		serve(os.Args[2], os.Args[3], handler())
	case "proxy":
		serve(os.Args[2], os.Args[3], proxy(os.Args[4]))
	case "plain":
		listener := listen(os.Args[2])
		fmt.Println("ready")
		log.Fatal(http.Serve(listener, handler()))
	case "client":
		client(os.Args[2], os.Args[3], os.Args[4:])
	case "pipe":
		pipe()
	}
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func number(text string) int {
	n, err := strconv.Atoi(text)
	check(err)
	return n
}

func listen(port string) net.Listener {
	listener, err := net.Listen("tcp", "127.0.0.1:"+port)
	check(err)
	return listener
}

func certificate() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "localhost"},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour * 48),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	check(err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func proxy(port string) http.Handler {
	target, err := url.Parse("https://127.0.0.1:" + port)
	check(err)
	handler := httputil.NewSingleHostReverseProxy(target)
	handler.Transport = &http.Transport{
		TLSClientConfig:     &tls.Config{InsecureSkipVerify: true},
		MaxIdleConnsPerHost: 100,
	}
	return handler
}

func serve(port, file string, handler http.Handler) {
	cert := certificate()
	check(os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}), 0o600))
	server := &http.Server{
		Handler:   handler,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}},
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	listener := listen(port)
	fmt.Println("ready")
	log.Fatal(server.ServeTLS(listener, "", ""))
}

func handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		io.WriteString(w, "hello")
	})
	// The checksum of what was sent.
	mux.HandleFunc("/sum", func(w http.ResponseWriter, r *http.Request) {
		sum := sha256.New()
		io.Copy(sum, r.Body)
		io.WriteString(w, hex.EncodeToString(sum.Sum(nil)))
	})
	// As many bytes as the path says, in one write.
	mux.HandleFunc("/large/", func(w http.ResponseWriter, r *http.Request) {
		n := number(strings.Split(r.URL.Path, "/")[2])
		w.Header().Set("Content-Length", strconv.Itoa(n))
		w.Write(bytes.Repeat([]byte{'x'}, n))
	})
	mux.HandleFunc("/endless", func(w http.ResponseWriter, r *http.Request) {
		for part := make([]byte, 8192); ; {
			if _, err := w.Write(part); err != nil {
				return
			}
		}
	})
	// A body that ends with the connection.
	mux.HandleFunc("/until", func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		check(err)
		io.WriteString(conn, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end")
		conn.Close()
	})
	return mux
}

// A client with one connection of one HTTP version, and the port of that.
func connection(port string, two bool) (*http.Client, *int) {
	local := new(int)
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		MaxConnsPerHost: 1,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			var dialer net.Dialer
			conn, err := dialer.DialContext(ctx, network, address)
			if err == nil {
				*local = conn.LocalAddr().(*net.TCPAddr).Port
			}
			return conn, err
		},
		ForceAttemptHTTP2: two,
	}
	if !two {
		transport.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	}
	return &http.Client{Transport: transport}, local
}

func get(c *http.Client, port, path string) string {
	response, err := c.Get("https://127.0.0.1:" + port + path)
	check(err)
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	check(err)
	return string(body)
}

func expect(got, wanted string) {
	if got != wanted {
		log.Fatalf("%.100q is not %.100q", got, wanted)
	}
}

func client(port, what string, rest []string) {
	switch what {
	case "keepalive":
		c, _ := connection(port, false)
		for i := 0; i < number(rest[1]); i++ {
			expect(get(c, port, fmt.Sprintf("/%s/%d", rest[0], i)), "hello")
		}
	case "paced":
		// One connection; a pause before each request, ms.
		c, _ := connection(port, false)
		for i := 0; i < number(rest[0]); i++ {
			time.Sleep(time.Duration(number(rest[1])) * time.Millisecond)
			expect(get(c, port, fmt.Sprintf("/paced/%d", i)), "hello")
		}
	case "checked":
		// Bodies both ways over many connections for some seconds, every byte checked.
		end := time.Now().Add(time.Duration(number(rest[0])) * time.Second)
		var group sync.WaitGroup
		for s := 0; s < 4; s++ {
			group.Add(1)
			go func(s int) {
				defer group.Done()
				for n := s * 100; time.Now().Before(end); n++ {
					c, _ := connection(port, s%2 == 0)
					for i := 0; i < 20; i++ {
						body := make([]byte, (n*20+i)*379%70000)
						rand.Read(body)
						response, err := c.Post("https://127.0.0.1:"+port+"/sum", "application/octet-stream", bytes.NewReader(body))
						check(err)
						answer, err := io.ReadAll(response.Body)
						check(err)
						sum := sha256.Sum256(body)
						expect(string(answer), hex.EncodeToString(sum[:]))
						checked.Lock()
						checked.n++
						checked.Unlock()
					}
					c.CloseIdleConnections()
				}
			}(s)
		}
		group.Wait()
		fmt.Println(checked.n)
	case "resumed":
		// A connection for each request, all but the first with the session of one before.
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			cache := tls.NewLRUClientSessionCache(4)
			for i := 0; i < number(rest[0]); i++ {
				c, _ := connection(port, false)
				config := c.Transport.(*http.Transport).TLSClientConfig
				config.MaxVersion = version
				config.ClientSessionCache = cache
				response, err := c.Get(fmt.Sprintf("https://127.0.0.1:%s/resumed/%d/%d", port, version&0xff-1, i))
				check(err)
				if response.TLS.DidResume != (i > 0) {
					log.Fatalf("resumed: %v", response.TLS.DidResume)
				}
				body, err := io.ReadAll(response.Body)
				check(err)
				expect(string(body), "hello")
				c.CloseIdleConnections()
			}
		}
	case "sessions":
		// The path says which port asked.
		var group sync.WaitGroup
		for s := 0; s < number(rest[0]); s++ {
			group.Add(1)
			go func() {
				defer group.Done()
				c, local := connection(port, false)
				expect(get(c, port, "/first"), "hello")
				for i := 0; i < number(rest[1]); i++ {
					expect(get(c, port, fmt.Sprintf("/p/%d/%d", *local, i)), "hello")
				}
			}()
		}
		group.Wait()
	case "streams":
		c, _ := connection(port, true)
		expect(get(c, port, "/first"), "hello")
		var group sync.WaitGroup
		for s := 0; s < number(rest[0]); s++ {
			group.Add(1)
			go func(s int) {
				defer group.Done()
				if s%8 == 0 {
					expect(get(c, port, fmt.Sprintf("/large/100000/%d", s)), strings.Repeat("x", 100000))
				} else {
					expect(get(c, port, fmt.Sprintf("/stream/%d", s)), "hello")
				}
			}(s)
		}
		group.Wait()
	case "large":
		c, _ := connection(port, false)
		body := make([]byte, 3<<20)
		rand.Read(body)
		response, err := c.Post("https://127.0.0.1:"+port+"/sum", "application/octet-stream", bytes.NewReader(body))
		check(err)
		answer, err := io.ReadAll(response.Body)
		check(err)
		sum := sha256.Sum256(body)
		expect(string(answer), hex.EncodeToString(sum[:]))
		expect(get(c, port, "/large/5000000"), strings.Repeat("x", 5000000))
	case "early":
		conn, err := tls.Dial("tcp", "127.0.0.1:"+port, &tls.Config{InsecureSkipVerify: true})
		check(err)
		fmt.Fprintf(conn, "GET /endless HTTP/1.1\r\nHost: t\r\n\r\n")
		_, err = io.ReadFull(conn, make([]byte, 1<<16))
		check(err)
		conn.Close()
	case "until":
		c, _ := connection(port, false)
		expect(get(c, port, "/until"), "until the end")
	}
}

func pipe() {
	near, far := net.Pipe()
	done := make(chan bool)
	go func() {
		server := tls.Server(far, &tls.Config{Certificates: []tls.Certificate{certificate()}})
		request, err := http.ReadRequest(bufio.NewReader(server))
		check(err)
		expect(request.URL.Path, "/pipe/"+os.Args[2])
		io.WriteString(server, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
		done <- true
	}()
	conn := tls.Client(near, &tls.Config{InsecureSkipVerify: true})
	fmt.Fprintf(conn, "GET /pipe/%s HTTP/1.1\r\nHost: t\r\n\r\n", os.Args[2])
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	check(err)
	body, err := io.ReadAll(response.Body)
	check(err)
	expect(string(body), "hello")
	<-done
	conn.Close()
}
