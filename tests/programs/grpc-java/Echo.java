// Calls of every kind by gRPC for Java, without generated code: messages are bytes.
//
//   serve PORT   answers until it is killed; prints ready
//   call  PORT   makes the calls, prints one line of JSON for each with what it sent and got

import io.grpc.CallOptions;
import io.grpc.ClientCall;
import io.grpc.HandlerRegistry;
import io.grpc.InsecureChannelCredentials;
import io.grpc.InsecureServerCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.ServerCall;
import io.grpc.ServerMethodDefinition;
import io.grpc.Status;
import io.grpc.netty.shaded.io.grpc.netty.NettyChannelBuilder;
import io.grpc.netty.shaded.io.grpc.netty.NettyServerBuilder;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.net.InetSocketAddress;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;

public class Echo {
    /** Hands bytes through. */
    static final MethodDescriptor.Marshaller<byte[]> RAW = new MethodDescriptor.Marshaller<>() {
        @Override public InputStream stream(byte[] message) {
            return new ByteArrayInputStream(message);
        }

        @Override public byte[] parse(InputStream message) {
            try {
                return message.readAllBytes();
            } catch (IOException e) {
                throw new IllegalStateException(e);
            }
        }
    };

    static MethodDescriptor<byte[], byte[]> method(String name) {
        return MethodDescriptor.<byte[], byte[]>newBuilder().setType(MethodDescriptor.MethodType.BIDI_STREAMING)
            .setFullMethodName(name).setRequestMarshaller(RAW).setResponseMarshaller(RAW).build();
    }

    /** Answers at the end of the request by the name of the method; Chat answers each message. */
    static ServerCall.Listener<byte[]> answer(ServerCall<byte[], byte[]> call, String name) {
        call.sendHeaders(new Metadata());
        call.request(1);
        return new ServerCall.Listener<>() {
            byte[] last = new byte[0];
            int count;

            @Override public void onMessage(byte[] message) {
                last = message;
                count++;
                if (name.equals("Chat")) {
                    call.sendMessage(message);
                }
                call.request(1);
            }

            @Override public void onHalfClose() {
                Status status = Status.OK;
                switch (name) {
                    case "Unary" -> call.sendMessage(last);
                    case "Fail" -> status = Status.fromCodeValue(last.length).withDescription("as asked for");
                    case "Many" -> {
                        for (int i = 0; i < last.length; i++) {
                            call.sendMessage(new byte[i]);
                        }
                    }
                    case "Collect" -> call.sendMessage(new byte[count]);
                    default -> { }
                }
                call.close(status, new Metadata());
            }
        };
    }

    static void serve(int port) throws Exception {
        var registry = new HandlerRegistry() {
            @Override public ServerMethodDefinition<?, ?> lookupMethod(String full, String authority) {
                String name = full.substring(full.lastIndexOf('/') + 1);
                return name.equals("Nowhere") ? null
                    : ServerMethodDefinition.create(method(full), (call, headers) -> answer(call, name));
            }
        };
        var server = NettyServerBuilder.forAddress(new InetSocketAddress("127.0.0.1", port), InsecureServerCredentials.create())
            .fallbackHandlerRegistry(registry).build().start();
        System.out.println("ready");
        server.awaitTermination();
    }

    /** Sends messages of these sizes, reads what comes, and says what went over the connection. */
    static void call(ManagedChannel channel, String name, int... sizes) throws Exception {
        var done = new CountDownLatch(1);
        var got = new int[3];
        ClientCall<byte[], byte[]> call =
            channel.newCall(method("java.Echo/" + name), CallOptions.DEFAULT.withDeadlineAfter(20, TimeUnit.SECONDS));
        call.start(new ClientCall.Listener<>() {
            @Override public void onMessage(byte[] message) {
                got[0]++;
                got[1] += 5 + message.length;
                call.request(1);
            }

            @Override public void onClose(Status status, Metadata trailers) {
                got[2] = status.getCode().value();
                done.countDown();
            }
        }, new Metadata());
        call.request(1);
        int request = 0;
        for (int size : sizes) {
            call.sendMessage(new byte[size]);
            request += 5 + size;
        }
        call.halfClose();
        done.await();
        synchronized (System.out) {
            System.out.printf("{\"path\":\"/java.Echo/%s\",\"status\":%d,\"sent\":%d,\"got\":%d,\"request\":%d,\"answer\":%d}%n",
                name, got[2], sizes.length, got[0], request, got[1]);
        }
    }

    static void calls(int port) throws Exception {
        var channel = NettyChannelBuilder.forAddress(new InetSocketAddress("127.0.0.1", port), InsecureChannelCredentials.create()).build();
        call(channel, "Unary", 1);
        var threads = new Thread[8];
        for (int i = 0; i < threads.length; i++) {
            int worker = i;
            threads[i] = new Thread(() -> {
                try {
                    for (int n = 0; n < 25; n++) {
                        call(channel, "Unary", worker * 1000 + n);
                    }
                    call(channel, "Fail", 1 + worker);
                    call(channel, "Many", 10 * worker);
                    call(channel, "Collect", new int[3 * worker]);
                    call(channel, "Chat", 0, 700, worker);
                } catch (Exception e) {
                    throw new IllegalStateException(e);
                }
            });
            threads[i].start();
        }
        for (Thread thread : threads) {
            thread.join();
        }
        channel.shutdown().awaitTermination(5, TimeUnit.SECONDS);
    }

    public static void main(String[] arguments) throws Exception {
        int port = Integer.parseInt(arguments[1]);
        if (arguments[0].equals("serve")) {
            serve(port);
        } else {
            calls(port);
        }
    }
}
